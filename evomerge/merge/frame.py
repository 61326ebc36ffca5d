"""What stays of an output tensor from candidate to candidate, which mostly differ in parameters alone.

A candidate of a small model is hundreds of tensors, and to find their inputs and put these into the form that loops
take takes longer than the parameters do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from evomerge.merge.kernels import cpu, cpu_arrays
from evomerge.merge.kernels.cpu_arrays import Place
from evomerge.merge.kernels.reference import Elements, Operation
from evomerge.merge.plan import TensorPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from evomerge.merge.bank import Bank, SourceLine
    from evomerge.merge.kernels.reference import Line


class Run(NamedTuple):
    """A run of a tensor's elements.

    Attributes:
        size: Number of elements.
        places: Where they are; see `cpu_arrays.prepared_at`.
    """

    size: int
    places: Sequence[Place]


class Frame:
    """One output tensor, whatever its parameters.

    Args:
        plan: What to do; its parameters are not looked at.
        out: Where the result goes, flat.
        bank: The sources, whose tensors stay in memory.
        part: Elements of a run.
    """

    def __init__(self, plan: TensorPlan, out: Tensor, bank: Bank, *, part: int) -> None:
        self._plan = plan
        self._out = out
        self._bank = bank
        self._part = part
        self._arrays = arrays_of([bank.line(key) for key in plan.inputs], out)
        self._runs: dict[tuple[bool, tuple[int, ...]], list[Run]] = {}

    def is_of(self, plan: TensorPlan, out: Tensor) -> bool:
        """Whether a tensor differs in nothing but parameters."""
        mine = self._plan
        return (
            plan.inputs == mine.inputs
            and plan.base == mine.base
            and plan.seed == mine.seed
            and out.data_ptr() == self._out.data_ptr()
            and out.dtype == self._out.dtype
        )

    @property
    def is_native(self) -> bool:
        """Whether the loops for the CPU know all types."""
        return self._arrays is not None

    def runs(self, operation: Operation) -> Sequence[Run]:
        """The runs to carry out an operation on, if it is native."""
        assert self._arrays is not None, "it is native"
        key = (cpu_arrays.treats_alike(operation), operation.ranked)
        known = self._runs.get(key)
        if known is None:
            known = self._runs[key] = list(self._found(self._arrays, operation.ranked, alike=key[0]))
        return known

    def _found(self, arrays: Sequence[NDArray[Any]], ranked: Sequence[int], *, alike: bool) -> Iterator[Run]:
        found = ranks_of(self._plan, ranked, self._bank)
        ranks = {source: cpu.flat(line) for source, line in found.items()}
        elements, out = elements_of(self._plan, arrays, ranks), cpu.flat(self._out)
        for first in range(0, elements.count, self._part):
            end = min(first + self._part, elements.count)
            yield Run(end - first, cpu_arrays.places(elements.part(first, end), out[first:end], alike=alike))


def arrays_of(lines: Sequence[SourceLine], out: Tensor) -> list[NDArray[Any]] | None:
    """Inputs as the loops for the CPU take them, if they are of one type that these know, as that of `out` is."""
    arrays = [line.array for line in lines if line.array is not None]
    alike = len(arrays) == len(lines) and all(array.dtype == arrays[0].dtype for array in arrays)
    return arrays if alike and cpu.is_native(out) and out.is_contiguous() else None


def ranks_of(plan: TensorPlan, ranked: Sequence[int], bank: Bank) -> dict[int, Tensor]:
    """Position of an input -> ranks of its task vector, for those asked for."""
    return {source: bank.ranks(plan.inputs[source], plan.inputs[plan.base or 0]) for source in ranked}


def elements_of(
    plan: TensorPlan, inputs: Sequence[Line], ranks: Mapping[int, Line], *, first: int = 0
) -> Elements[Line]:
    """All elements of the inputs of a tensor, or those from position `first` on."""
    return Elements(
        name=plan.name,
        seed=plan.seed,
        shape=plan.shape,
        first=first,
        tensors=inputs,
        base=plan.base,
        ranks=ranks,
    )
