"""Modules that multiply their result, in place of a scaled copy of their weights.

A module's class is exchanged for one that scales; its parameters stay those of the source. Which modules may be
is told by what they are, not by their names: what the result of a module is must be linear in the parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from torch import Tensor


class _ScaledProduct:
    """A product with a matrix, plus a bias, each with a factor of its own."""

    weight_factor: float = 1.0
    bias_factor: float = 1.0
    _parameters: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """The matrix that the factor stands for, for whoever does not call the module."""
        weight: Tensor = self._parameters["weight"]
        return weight if self.weight_factor == 1 else weight * self.weight_factor

    @property
    def bias(self) -> Tensor | None:
        """The bias that its factor stands for."""
        bias: Tensor | None = self._parameters["bias"]
        return bias if bias is None or self.bias_factor == 1 else bias * self.bias_factor

    def _scaled(self, product: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        if self.weight_factor != 1:
            product.mul_(self.weight_factor)
        return product if bias is None else product.add_(bias, alpha=self.bias_factor)


class _ScaledLinear(_ScaledProduct, nn.Linear):  # type: ignore[misc, override]
    """x W^T f + b g, for the factors f and g."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) to (..., out)."""
        if self.weight_factor == self.bias_factor == 1:
            return nn.functional.linear(x, self._parameters["weight"], self._parameters["bias"])
        return self._scaled(nn.functional.linear(x, self._parameters["weight"]))


class _ScaledConv1D(_ScaledProduct, Conv1D):  # type: ignore[misc]
    """x W f + b g: GPT-2's layer, whose matrix is transposed."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) to (..., out)."""
        if self.weight_factor == self.bias_factor == 1:
            return super().forward(x)  # type: ignore[no-any-return]
        return self._scaled(x @ self._parameters["weight"])


_PRODUCTS: Mapping[type, type] = {nn.Linear: _ScaledLinear, Conv1D: _ScaledConv1D}


def take(module: nn.Module, factors: Mapping[str, float]) -> set[str]:
    """Have a module compute what it would with scaled parameters.

    Args:
        module: The module; its class may change, its parameters do not.
        factors: Name of a parameter -> its factor.

    Returns:
        The parameters whose factors it took; the others are as before.
    """
    kind = type(module)
    if kind in _PRODUCTS:
        module.__class__ = _PRODUCTS[kind]
    if isinstance(module, _ScaledProduct):
        _set(module, weight_factor=factors.get("weight", 1.0), bias_factor=factors.get("bias", 1.0))
        return set(factors)
    together = _linear_in(module)
    if not together or not together <= factors.keys() or len({factors[name] for name in together}) > 1:
        return set()
    if not isinstance(module, _ScaledResult):
        module.__class__ = _scaling(kind)  # type: ignore[arg-type]
    _set(module, result_factor=factors[min(together)])
    return together


def forget(module: nn.Module) -> None:
    """Make a module compute again what its parameters say."""
    if isinstance(module, _ScaledProduct):
        _set(module, weight_factor=1.0, bias_factor=1.0)
    elif isinstance(module, _ScaledResult):
        _set(module, result_factor=1.0)


def _set(module: nn.Module, **factors: float) -> None:
    # Modules take ten times as long to set a number themselves.
    vars(module).update(factors)


class _ScaledResult:
    """Marks classes made by `_scaling`."""

    result_factor: float = 1.0


@cache
def _scaling(kind: type[Any]) -> type[nn.Module]:
    """The class of modules like these that multiply their result."""

    class Scaled(_ScaledResult, kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = super().forward(*args, **kwargs)
            return result if self.result_factor == 1 else result * self.result_factor

    Scaled.__name__ = f"Scaled{kind.__name__}"
    return Scaled


def _linear_in(module: nn.Module) -> set[str]:
    """Parameters in which a module's result is linear, all of them together; empty if none are known."""
    if isinstance(module, nn.Embedding):
        return {"weight"} if isinstance(module, _ScaledResult) or _looks_up(module) else set()
    # Experts that transformers holds in one module, and runs in several ways, say so.
    if getattr(module, "has_post_expert_norm", None) is False:
        return {name for name in ("down_proj", "down_proj_bias") if name in module._parameters}
    return set()


def _looks_up(embedding: nn.Embedding) -> bool:
    """Whether an embedding, of whatever class, gives twice as much for rows that are twice as large."""
    weight = embedding.weight
    rows = torch.linspace(-1, 1, 2 * embedding.embedding_dim, dtype=weight.dtype, device=weight.device)
    probe = copy.deepcopy(embedding, {id(weight): nn.Parameter(rows.view(2, -1), requires_grad=False)})
    probe.num_embeddings, probe.padding_idx = 2, None
    numbers = torch.arange(2, device=weight.device)
    once = probe(numbers)
    probe.weight.data.mul_(2)
    return torch.equal(probe(numbers), once * 2)
