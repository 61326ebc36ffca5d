"""Operations in torch, on any device: what the kernels are held against.

Combinations and sums of task vectors are carried out as their definitions read; see `methods/base.py` and
`methods/task_vectors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from evomerge.merge.methods.base import Axis, Combination, MergeInputs
from evomerge.merge.methods.task_vectors import TaskVectorSum, add_task_vectors

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from torch import Tensor

Line = TypeVar("Line", "Tensor", "NDArray[Any]")
"""Elements of one tensor, flat: in torch, or in the form that the loops for the CPU take; see `cpu_arrays`."""

Other = TypeVar("Other", "Tensor", "NDArray[Any]")

Operation = Combination | TaskVectorSum

PIECE = 1 << 22
"""Elements that are worked on at once: temporaries take many times an element's size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Elements(Generic[Line]):
    """A run of elements of one output tensor's inputs.

    Attributes:
        name: Name of the output tensor.
        seed: The recipe's seed.
        shape: Shape of the whole tensor.
        first: Position of the first element in the flattened tensor.
        tensors: Per input, the run's elements in the type they are stored in, flat.
        base: Position of the base among the inputs, or None.
        ranks: Position of a ranked source -> ranks of the run's elements; see `task_vectors.row_ranks`.
    """

    name: str
    seed: int
    shape: tuple[int, ...]
    first: int
    tensors: Sequence[Line]
    base: int | None
    ranks: Mapping[int, Line] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of elements of the run."""
        return len(self.tensors[0])

    def part(self, start: int, end: int) -> Elements[Line]:
        """The elements start <= e < end of the run."""
        if end - start == self.count:
            return self
        return self.each(lambda line: line[start:end], first=self.first + start)

    def each(self, change: Callable[[Line], Other], *, first: int | None = None) -> Elements[Other]:
        """The run with its tensors and ranks changed, and the position of its first element if that is given."""
        return Elements(
            name=self.name,
            seed=self.seed,
            shape=self.shape,
            first=self.first if first is None else first,
            tensors=[change(tensor) for tensor in self.tensors],
            base=self.base,
            ranks={source: change(ranks) for source, ranks in self.ranks.items()},
        )


def run(operation: Operation, elements: Elements[Tensor], out: Tensor) -> bool:
    """Carry out an operation on a run of elements.

    Args:
        operation: What to do.
        elements: Its inputs.
        out: Flat tensor of as many elements, of the type to round to; written.

    Returns:
        Whether every result is finite.
    """
    import torch

    finite = torch.ones((), dtype=torch.bool, device=out.device)
    for start in range(0, elements.count, PIECE):
        piece = out[start : start + PIECE]
        piece.copy_(_merged(operation, elements.part(start, start + piece.numel())))
        finite &= piece.isfinite().all()
    return bool(finite)


def _merged(operation: Operation, elements: Elements[Tensor]) -> Tensor:
    if isinstance(operation, Combination):
        return _combine(operation, elements)
    inputs = MergeInputs(
        name=elements.name,
        tensors=[tensor.float() for tensor in elements.tensors],
        base=elements.base,
        shared={},
        values=(),
        seed=elements.seed,
        first=elements.first,
    )
    return add_task_vectors(operation, inputs, elements.ranks)


def _combine(operation: Combination, elements: Elements[Tensor]) -> Tensor:
    """Σ_i c_i θ_i / divisor, or around the base; a coefficient for the whole, a row or a column."""
    import torch

    coefficients = torch.from_numpy(operation.coefficients).float().to(elements.tensors[0].device)
    if operation.axis is not Axis.WHOLE:
        columns = num_columns(elements.shape, operation.axis)
        places = torch.arange(elements.first, elements.first + elements.count, device=coefficients.device)
        places = places // columns if operation.axis is Axis.ROWS else places % columns
        coefficients = coefficients[places]
    total = torch.zeros_like(elements.tensors[0], dtype=torch.float32)
    base = elements.tensors[elements.base].float() if operation.around_base else None  # type: ignore[index]
    for index, tensor in enumerate(elements.tensors):
        if base is None:
            total.add_(tensor.float() * coefficients[..., index])
        elif index != elements.base:
            total.add_((tensor.float() - base).mul_(coefficients[..., index]))
    total.div_(operation.divisor)
    return total if base is None else total.add_(base)


def num_columns(shape: tuple[int, ...], axis: Axis) -> int:
    """Length of a row, or number of vectors along the first dimension; see `Axis`."""
    return (shape or (1,))[-1] if axis is Axis.ROWS else math.prod(shape[1:])
