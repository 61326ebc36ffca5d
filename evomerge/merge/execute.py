"""Carries out one tensor plan with the reference formulas: float32 in, one rounding at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from evomerge.errors import CheckpointError, Fault
from evomerge.merge.methods import MergeInputs
from evomerge.merge.plan import TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 16
"""Elements that an elementwise method is given at once: its temporaries stay in the processor's cache."""


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
    merged = torch.empty(plan.shape, dtype=getattr(torch, plan.dtype))
    if not plan.method.elementwise:
        return merged.copy_(_merge_piece(plan, tensors, first=0))
    out, flat = merged.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for first in range(0, out.numel(), PIECE):
        piece = [tensor[first : first + PIECE] for tensor in flat]
        out[first : first + PIECE] = _merge_piece(plan, piece, first=first)
    return merged


def _merge_piece(plan: TensorPlan, tensors: Sequence[Tensor], *, first: int) -> Tensor:
    inputs = MergeInputs(
        name=plan.name,
        tensors=[tensor.float() for tensor in tensors],
        base=plan.base,
        shared=plan.shared,
        values=plan.values,
        seed=plan.seed,
        first=first,
    )
    return plan.method.formula(inputs)


def is_finite(tensor: Tensor) -> bool:
    """Whether a merged tensor holds no NaN and no infinity."""
    # An 8-bit float, which is only ever copied, has no arithmetic.
    return not tensor.is_floating_point() or tensor.itemsize == 1 or bool(tensor.isfinite().all())


def _copy(plan: TensorPlan, tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    for (model, name), tensor in zip(plan.inputs, tensors, strict=True):
        if tensor.dtype != first.dtype or not _same_bits(tensor, first):
            reason = (
                f"{name} is of type {tensor.dtype} and differs between the models; only equal ones are copied"
            )
            raise CheckpointError(Fault(path=model, reason=reason))
    return first.clone()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    # 8-bit floats cannot be compared as they are.
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
