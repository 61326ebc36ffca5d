"""Builds the inputs of formulas, runs ours and mergekit's on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.merge.methods import METHODS, MergeInputs, Scope


def merge(
    method: str,
    tensors: list[Any],
    values: list[dict[str, Any]] | None = None,
    *,
    base: int | None = None,
    seed: int = 0,
    name: str = "w",
    **shared: Any,
) -> Tensor:
    """Run our formula, defaults filled in as a plan would."""
    parameters = METHODS[method].parameters
    defaults = {item.name: item.default for item in parameters if item.scope is Scope.RECIPE}
    own = {item.name: item.default for item in parameters if item.scope is not Scope.RECIPE}
    inputs = MergeInputs(
        name=name,
        tensors=[torch.as_tensor(tensor, dtype=torch.float32) for tensor in tensors],
        base=base,
        shared={**defaults, **shared},
        values=[{**own, **given} for given in (values or [{}] * len(tensors))],
        seed=seed,
    )
    before = [tensor.clone() for tensor in inputs.tensors]
    merged = METHODS[method].formula(inputs)
    assert merged.dtype == torch.float32
    assert merged.shape == inputs.tensors[0].shape
    for tensor, copy in zip(inputs.tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.int32), copy.view(torch.int32)), "an input was changed"
        assert tensor.numel() == 0 or tensor.data_ptr() != merged.data_ptr(), "an input was handed out"
    return merged


def mergekit(
    method: str,
    tensors: list[Tensor],
    values: list[dict[str, Any]] | None = None,
    *,
    base: int | None = None,
    **shared: Any,
) -> Tensor:
    """Run mergekit's method on the same inputs."""
    from mergekit.merge_methods.base import TensorGroup

    from tests.oracle import registry

    values = values or [{}] * len(tensors)
    per_model = {
        name: {index: given[name] for index, given in enumerate(values) if name in given}
        for name in {name for given in values for name in given}
    }
    group = TensorGroup.from_tensors(tensors, base_index=base)
    (merged,) = registry.get(method)([group], parameters={**shared, **per_model})
    return merged


def mergekit64(method: str, tensors: list[Tensor], *args: Any, **given: Any) -> Tensor:
    """mergekit's method in float64, where its own rounding does not count."""
    return mergekit(method, [tensor.double() for tensor in tensors], *args, **given)


def family(*shape: int, count: int = 3, seed: int = 0, change: float = 0.1) -> list[Tensor]:
    """A random base and `count` fine-tuned relatives of it, the base first."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base] + [base + change * torch.randn(shape, generator=generator) for _ in range(count)]


def weights(*numbers: float, **other: Any) -> list[dict[str, Any]]:
    """Values of a base without any, and of one source per number."""
    return [{}, *({"weight": number, **other} for number in numbers)]


def rounds_to(ours: Tensor, exact: Tensor, *tensors: Tensor) -> None:
    """Equal to a float64 result but for a few roundings of summands as large as the tensors together."""
    size = sum(float(tensor.abs().max()) for tensor in tensors) if ours.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact, rtol=5e-7, atol=5e-7 * max(size, 1e-30))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the order of a few float32 additions.

    Merged weights can cancel to nearly 0, where one unit in the last place of a summand is many of the sum:
    hence a bound relative to the summands' size, about 1, beside that of the result.
    """
    torch.testing.assert_close(ours, theirs, rtol=5e-7, atol=5e-7)
