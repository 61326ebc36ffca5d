"""Native tensors on their way into a checkpoint: the threads fill one buffer after the other.

    tensors ──► batch: as many as fit into a buffer, or a part of a large one
                  ├─ thread: prepare, merge ─┐
                  └─ thread: prepare, merge ─┴─► buffer ──► stream

A batch is begun before the one before is complete, so that threads need not wait for each other; they are handed
over in their order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.stream import Buffer, TensorStream
from evomerge.merge.finite import not_finite
from evomerge.merge.kernels.cpu_arrays import READ
from evomerge.merge.kernels.threads import num_threads, start
from evomerge.merge.memory import Memory
from evomerge.merge.native import NativeTensor, native_type, prepare_native
from evomerge.merge.plan import TensorPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Elements of a tensor that one thread merges; the thread prepares the tensor if that was not done before."""

    plan: TensorPlan
    prepared: NativeTensor | None
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * native_type(self.plan).itemsize


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Runs under way, each with whether its elements are finite."""

    buffer: Buffer
    nbytes: int
    runs: list[tuple[_Run, Future[bool]]]


class Batches:
    """Merges native tensors in the order in which they are added.

    A context manager: when it is left, no thread is at work any more.

    Args:
        sources: Model as the recipe names it -> its checkpoint.
        stream: What takes the tensors.
        memory: How much may be in memory.
    """

    def __init__(self, sources: Mapping[str, Checkpoint], stream: TensorStream, memory: Memory) -> None:
        self._sources = sources
        self._stream = stream
        self._memory = memory
        self._threads = num_threads()
        self._next: list[_Run] = []
        self._under_way: deque[_Batch] = deque()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait([future for batch in self._under_way for _, future in batch.runs])

    def add(self, plan: TensorPlan) -> Iterator[int]:
        """Take a tensor; yields the bytes of every batch that is handed over meanwhile.

        Raises:
            CheckpointError: A merged tensor is not finite, or a file changed.
        """
        whole = _Run(plan=plan, prepared=None, first=0, count=math.prod(plan.shape))
        if whole.nbytes + sum(run.nbytes for run in self._next) > self._memory.buffer_bytes:
            yield from self._begin()
        if whole.nbytes <= self._memory.buffer_bytes:
            self._next.append(whole)
            return
        # The threads share in its statistics, too.
        prepared = self._prepare(plan)
        step = self._memory.elements(native_type(plan).itemsize)
        share = -(-step // self._threads)
        for begin in range(0, whole.count, step):
            end = min(begin + step, whole.count)
            self._next = [
                _Run(plan=plan, prepared=prepared, first=first, count=min(share, end - first))
                for first in range(begin, end, share)
            ]
            yield from self._begin()

    def flush(self) -> Iterator[int]:
        """Hand over everything that was added; yields and raises as `add`."""
        yield from self._begin()
        while self._under_way:
            yield self._hand_over()

    def _begin(self) -> Iterator[int]:
        """Have the threads merge what was collected."""
        if not self._next:
            return
        buffer = self._stream.buffer()
        nbytes = 0
        runs = []
        for run in self._next:
            out = buffer.array(native_type(run.plan), run.count, nbytes)
            nbytes += run.nbytes
            runs.append((run, start(partial(self._merge, run, out))))
        self._next = []
        self._under_way.append(_Batch(buffer=buffer, nbytes=nbytes, runs=runs))
        if len(self._under_way) > 1:
            yield self._hand_over()

    def _hand_over(self) -> int:
        """Wait for the batch that was begun first."""
        batch = self._under_way[0]
        wait([future for _, future in batch.runs])
        self._under_way.popleft()
        for run, future in batch.runs:
            if not future.result():
                raise not_finite(run.plan, self._sources)
        self._stream.put(batch.buffer, batch.nbytes)
        return batch.nbytes

    def _merge(self, run: _Run, out: NDArray[Any]) -> bool:
        prepared = run.prepared or self._prepare(run.plan)
        return prepared.write(out, run.first)

    def _prepare(self, plan: TensorPlan) -> NativeTensor:
        # All threads together hold no more of the inputs than a chunk of them.
        share = self._memory.elements(native_type(plan).itemsize) // self._threads
        return prepare_native(plan, self._sources, piece=max(1, min(READ, share)))
