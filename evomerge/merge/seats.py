"""Where weights sit in modules, and what has them scaled there.

A factor becomes a multiplier of a module's result where it can (`scaled_modules`). Elsewhere, as in norms, a
scaled copy takes the place of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from evomerge.merge.bank import Bank
from evomerge.merge.execute import is_finite, merge_tensor, prepare_tensor, why_not_finite
from evomerge.merge.live import NonFiniteWeightsError
from evomerge.merge.plan import TensorPlan
from evomerge.merge.view_sources import Held, owner_of, put

if TYPE_CHECKING:
    import torch
    from torch.nn import Module, Parameter

FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class Seats:
    """Where tensors sit in module objects, and which of them are scaled.

    Args:
        root: The module.
        names: Names of parameters and buffers in it.
    """

    def __init__(self, root: Module, names: Iterable[str]) -> None:
        self._owners = {name: owner_of(root, name) for name in names}
        self._multiplied: list[Module] = []
        self._replaced: list[tuple[Module, str, Parameter]] = []

    def put(self, held: Held) -> None:
        """Seat a tensor under all its names."""
        for name in held.form.names:
            put(*self._owners[name], held.parameter)

    def scale(self, changes: Sequence[tuple[Held, TensorPlan]], bank: Bank) -> None:
        """Make modules compute as if tensors were scaled.

        Args:
            changes: What is held, and a plan that scales (a part of) it.
            bank: The sources.

        Raises:
            NonFiniteWeightsError: A scaled tensor is not finite.
        """
        from evomerge.merge.scaled_modules import take

        plans: dict[Held, list[TensorPlan]] = {}
        for held, plan in changes:
            plans.setdefault(held, []).append(plan)
        by_owner: dict[Module, dict[str, Held]] = {}
        for held in plans:
            for name in held.form.names:
                owner, attribute = self._owners[name]
                by_owner.setdefault(owner, {})[attribute] = held
        made: dict[Held, Parameter] = {}
        for owner, changed in by_owner.items():
            common = {attribute: _factor(held, plans[held]) for attribute, held in changed.items()}
            factors = {attribute: factor for attribute, factor in common.items() if factor is not None}
            taken = take(owner, factors)
            if taken:
                self._multiplied.append(owner)
            for attribute, held in changed.items():
                if attribute in taken:
                    _check_range(held, plans[held], factors[attribute], bank)
                    continue
                if held not in made:
                    made[held] = _scaled_copy(held, plans[held], bank)
                self._replaced.append((owner, attribute, held.parameter))
                put(owner, attribute, made[held])

    def restore(self) -> None:
        """Undo all scaling."""
        from evomerge.merge.scaled_modules import forget

        for owner in self._multiplied:
            forget(owner)
        for owner, attribute, parameter in self._replaced:
            put(owner, attribute, parameter)
        self._multiplied.clear()
        self._replaced.clear()


def is_scaled(plan: TensorPlan) -> bool:
    """Whether a tensor that is passed through changes on its way."""
    scale = plan.values[0]["scale"]
    return (scale is not None and scale != 1) or (plan.rescale is not None and plan.rescale[0] != 1)


def not_finite(plans: Iterable[TensorPlan], key: tuple[str, str], bank: Bank) -> NonFiniteWeightsError:
    """Say of a source's tensor that it, or what is made of it, is not finite.

    Args:
        plans: Plans, one of which passes it through.
        key: The tensor.
        bank: The sources.
    """
    plan = next(plan for plan in plans if plan.inputs[0] == key)
    return NonFiniteWeightsError(f"{plan.name}: {why_not_finite(prepare_tensor(plan, bank))}")


def _factor(held: Held, plans: Sequence[TensorPlan]) -> float | None:
    """What all elements of a tensor are multiplied by, or None if it is not one number."""
    factors = set()
    for plan in plans:
        scale = plan.values[0]["scale"]
        factor, offset = plan.rescale or (1.0, 0.0)
        if offset and factor != 1:
            return None
        factors.add(factor * (1.0 if scale is None else scale))
    return factors.pop() if len(factors) == 1 and len(plans) == len(held.regions) else None


def _scaled_copy(held: Held, plans: Sequence[TensorPlan], bank: Bank) -> Parameter:
    import torch

    made = held.parameter.data.clone()
    for plan in plans:
        part = made.as_strided(*held.regions[plan.inputs[0][1]])
        prepared = prepare_tensor(plan, bank)
        if part.is_contiguous() and part.dtype == prepared.dtype:
            finite = prepared.write(part.view(-1))
        else:
            part.copy_(merge_tensor(plan, bank))
            finite = is_finite(part)
        if not finite:
            raise not_finite([plan], plan.inputs[0], bank)
    return torch.nn.Parameter(made, requires_grad=False)


def _check_range(held: Held, plans: Sequence[TensorPlan], factor: float, bank: Bank) -> None:
    """Refuse a factor by which weights would leave the range of their type, though none is multiplied."""
    for plan in plans:
        limit = min(_largest_number(held.parameter.dtype), _largest_number(str(plan.dtype)))
        if not held.largest(plan.inputs[0][1]) * abs(factor) <= limit or abs(factor) > FLOAT32_MAX:
            raise not_finite([plan], plan.inputs[0], bank)


@cache
def _largest_number(dtype: torch.dtype | str) -> float:
    import torch

    return torch.finfo(getattr(torch, dtype) if isinstance(dtype, str) else dtype).max
