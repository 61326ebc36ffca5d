"""Tensors merged on the CPU straight from their files, without torch.

    files ── read ──► a piece of every input ── loops ──► the same piece of the output

Importing torch takes longer than merging a small model. A tensor is native if its inputs are of one type that the
loops know, bfloat16 or float32, and its method comes down to an operation for which the loops can find out what
there is to know. Every other one is merged by `execute`, with the same loops where there is an operation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.execute import operation_of
from evomerge.merge.frame import elements_of
from evomerge.merge.histogram import Histogram
from evomerge.merge.kernels import cpu_arrays
from evomerge.merge.kernels.cpu_arrays import Read
from evomerge.merge.kernels.reference import Operation
from evomerge.merge.memory import is_made
from evomerge.merge.methods.base import Axis, GramKind
from evomerge.merge.methods.task_vectors import Ranked, TaskVectorSum
from evomerge.merge.plan import TensorPlan
from evomerge.merge.statistics import Key

if TYPE_CHECKING:
    from numpy.typing import NDArray

_local = threading.local()

_TYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype(np.uint16), "F32": np.dtype(np.float32)}
"""safetensors' name of a type -> what the loops take and give."""
_OUT_TYPES = {"bfloat16": _TYPES["BF16"], "float32": _TYPES["F32"]}


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeTensor:
    """A native output tensor that can be computed, any run of its elements by itself.

    Attributes:
        plan: What to do.
        operation: What the loops carry out.
        read: Gives elements of all inputs.
        piece: How many of them at once.
    """

    plan: TensorPlan
    operation: Operation
    read: Read
    piece: int

    def write(self, out: NDArray[Any], first: int = 0) -> bool:
        """Compute the elements first <= e < first + len(out), on this thread.

        Args:
            out: Flat, of the type `native_type` says; written.
            first: Position of the first element.

        Returns:
            Whether all of them are finite.
        """
        finite = True
        for start in range(0, len(out), self.piece):
            piece = out[start : start + self.piece]
            inputs = self.read(first + start, first + start + len(piece))
            elements = elements_of(self.plan, inputs, {}, first=first + start)
            finite &= cpu_arrays.run_part(self.operation, elements, piece)
        return finite


def native_type(plan: TensorPlan) -> np.dtype[Any]:
    """Type of the result of a native tensor as the loops give it: bfloat16 as uint16."""
    assert plan.dtype is not None, "copies are not merged"
    return _OUT_TYPES[plan.dtype]


def is_native(plan: TensorPlan, sources: Mapping[str, Checkpoint]) -> bool:
    """Whether a tensor can be merged on the CPU without torch."""
    infos = [sources[model].tensors[name] for model, name in plan.inputs]
    return (
        plan.dtype in _OUT_TYPES
        and plan.rescale is None
        and len({info.dtype for info in infos}) == 1
        and infos[0].dtype in _TYPES
        and not any(is_made(info) for info in infos)
        and _has_native_operation(plan)
    )


def _has_native_operation(plan: TensorPlan) -> bool:
    """Whether the loops can carry it out, knowing only what they can find out."""
    try:
        operation = operation_of(plan, _Questions())
    except _QuestionError as question:
        return question.answerable
    is_ranked = isinstance(operation, TaskVectorSum) and any(
        isinstance(term.keep, Ranked) for term in operation.terms
    )
    return operation is not None and not is_ranked


class _QuestionError(Exception):
    def __init__(self, *, answerable: bool) -> None:
        self.answerable = answerable


class _Questions:
    """Answers none, but tells whether the loops can; a method asks questions of one kind only."""

    def histogram(self, *_: Key) -> Histogram:
        raise _QuestionError(answerable=True)

    def gram(self, *about: object) -> NDArray[np.float64]:
        raise _QuestionError(answerable=about[-1] is Axis.WHOLE)


def prepare_native(plan: TensorPlan, sources: Mapping[str, Checkpoint], *, piece: int) -> NativeTensor:
    """Do the scalar work of one tensor that is native; statistics it needs read the inputs once.

    Args:
        plan: What to do.
        sources: Model as the recipe names it -> its checkpoint.
        piece: Elements of every input that a thread may hold.
    """
    inputs = _Inputs(sources, math.prod(plan.shape), piece)
    operation = operation_of(plan, inputs)
    assert operation is not None, "it is native"
    return NativeTensor(plan=plan, operation=operation, read=inputs.reader(plan.inputs), piece=piece)


class _Inputs:
    """Elements of tensors, read in pieces, and what methods ask to know of them."""

    def __init__(self, sources: Mapping[str, Checkpoint], count: int, piece: int) -> None:
        self._sources = sources
        self._count = count
        self._piece = piece

    def reader(self, keys: Sequence[Key]) -> Read:
        """What gives elements of some of the tensors."""

        def read(first: int, end: int) -> list[NDArray[Any]]:
            return [self._read(key, first, end, place) for place, key in enumerate(keys)]

        return read

    def _read(self, key: Key, first: int, end: int, place: int) -> NDArray[Any]:
        model, name = key
        elements = _own_memory(place, end - first, _TYPES[self._sources[model].tensors[name].dtype])
        self._sources[model].read(name, first, elements)
        return elements

    def histogram(self, source: Key, base: Key) -> Histogram:
        """Magnitude histogram of the task vector of a source."""
        return cpu_arrays.histogram(self.reader([base, source]), self._count, piece=self._piece)

    def gram(
        self, tensors: Sequence[Key], base: int | None, kind: GramKind, axis: Axis
    ) -> NDArray[np.float64]:
        """Gram matrices; see `Bank.gram`."""
        assert axis is Axis.WHOLE, "it is native"
        origin = base if kind is GramKind.TASK_VECTORS else None
        picked = [key for index, key in enumerate(tensors) if index != origin]
        read = self.reader(picked if origin is None else [*picked, tensors[origin]])
        return cpu_arrays.gram(read, self._count, number=len(picked), around_base=origin is not None)


def _own_memory(place: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory of this thread for one of several inputs, used again for every piece: fresh pages take time."""
    held: dict[int, NDArray[np.uint8]] = _local.__dict__.setdefault("held", {})
    nbytes = count * dtype.itemsize
    if place not in held or held[place].nbytes < nbytes:
        held[place] = np.empty(nbytes, np.uint8)
    return held[place][:nbytes].view(dtype)
