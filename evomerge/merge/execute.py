"""Carries out one tensor plan with the reference formulas: float32 in, one rounding at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from evomerge.errors import CheckpointError, Fault
from evomerge.merge.methods import MergeInputs
from evomerge.merge.plan import TensorPlan

if TYPE_CHECKING:
    from torch import Tensor


class TensorSource(Protocol):
    """Anything that hands out a model's tensors by name, such as a `Checkpoint`."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, to be treated as read-only."""
        ...


def merge_tensor(plan: TensorPlan, sources: Mapping[str, TensorSource]) -> Tensor:
    """Merge one tensor.

    Args:
        plan: What to do.
        sources: Model as the recipe names it -> its tensors.

    Returns:
        A new tensor of the plan's shape and type.

    Raises:
        CheckpointError: A tensor that is copied rather than merged differs between the models.
    """
    import torch

    tensors = [sources[model].tensor(name) for model, name in plan.inputs]
    if plan.dtype is None:
        return _copy(plan, tensors)
    inputs = MergeInputs(
        name=plan.name,
        tensors=[tensor.float() for tensor in tensors],
        base=plan.base,
        shared=plan.shared,
        values=plan.values,
        seed=plan.seed,
    )
    merged: Tensor = plan.method.formula(inputs).to(getattr(torch, plan.dtype))
    return merged


def _copy(plan: TensorPlan, tensors: list[Tensor]) -> Tensor:
    import torch

    first = tensors[plan.base or 0]
    for (model, name), tensor in zip(plan.inputs, tensors, strict=True):
        if tensor.dtype != first.dtype or not torch.equal(tensor, first):
            reason = (
                f"{name} is of type {tensor.dtype} and differs between the models; only equal ones are copied"
            )
            raise CheckpointError(Fault(path=model, reason=reason))
    return first.clone()
