"""Merges a plan's tensors into a checkpoint's weight files, chunk by chunk, within a memory budget.

    sources ──► merge a chunk ──► buffer ──► writer thread ──► disk
        ▲   │
  prefetch  release

While one chunk is merged, the system reads the next ones and the writer's thread writes the one before. Native
tensors are read in pieces by several threads; see `batches`. The others are mapped, and their pages given back
chunk by chunk, so what is in memory does not grow with the models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.stream import NUM_BUFFERS, TensorStream
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.merge.batches import Batches
from evomerge.merge.execute import Bank, PreparedTensor, prepare_tensor
from evomerge.merge.finite import not_finite
from evomerge.merge.memory import Memory, bytes_per_element, spec_of
from evomerge.merge.native import is_native
from evomerge.merge.plan import TensorPlan

LOOK_AHEAD = 8
"""Chunks that the system is asked to read ahead of the one being merged."""

Progress = Callable[[int, int], None]


def write_tensors(
    plans: Sequence[TensorPlan],
    sources: Mapping[str, Checkpoint],
    writer: CheckpointWriter,
    *,
    memory: Memory,
    device: str,
    progress: Progress | None,
) -> None:
    """Merge every tensor into the weight files of a checkpoint.

    Args:
        plans: What to do for every tensor.
        sources: Model as the recipe names it -> its checkpoint.
        writer: What takes the tensors.
        memory: How much may be in memory.
        device: Where the merge is computed.
        progress: Called with (bytes merged, bytes in all).

    Raises:
        CheckpointError: A merged tensor is not finite.
        ConfigurationError: A tensor needs more memory than there may be; nothing was written.
        EvomergeError: The disk is too small.
    """
    by_name = {plan.name: plan for plan in plans}
    specs = [spec_of(plan, sources) for plan in plans]
    total = sum(spec.nbytes for spec in specs)
    done = 0
    with writer.stream(specs, buffer_bytes=memory.buffer_bytes) as stream:
        ordered = [[by_name[spec.name] for spec in shard.tensors] for shard in stream.shards]
        ahead = _ReadAhead(
            _prefetches([plan for shard in ordered for plan in shard], sources, memory.buffer_bytes),
            LOOK_AHEAD * memory.buffer_bytes,
        )
        ahead.move_to(0)
        for shard in ordered:
            with contextlib.closing(_write_shard(shard, sources, stream, memory, device)) as chunks:
                for nbytes in chunks:
                    done += nbytes
                    ahead.move_to(done)
                    if progress is not None:
                        progress(done, total)


def _write_shard(
    plans: Sequence[TensorPlan],
    sources: Mapping[str, Checkpoint],
    stream: TensorStream,
    memory: Memory,
    device: str,
) -> Generator[int, None, None]:
    """Merge and hand over the tensors of a shard; yields the bytes of every chunk."""
    with Batches(sources, stream, memory) as batches:
        for plan in plans:
            if _is_native(plan, sources, device):
                yield from batches.add(plan)
            else:
                yield from batches.flush()
                yield from _write_tensor(plan, sources, stream, memory, device)
        yield from batches.flush()


def _is_native(plan: TensorPlan, sources: Mapping[str, Checkpoint], device: str) -> bool:
    return device == "cpu" and is_native(plan, sources)


def check_memory(
    plans: Sequence[TensorPlan], sources: Mapping[str, Checkpoint], memory: Memory, *, device: str
) -> None:
    """Refuse a merge that would exceed the budget half-way.

    Only tensors so large that some method might need too much are looked at more closely.

    Raises:
        ConfigurationError: Names the tensor, its need and the budget.
    """
    if memory.budget is None:
        return
    for plan in plans:
        if _is_native(plan, sources, device):
            continue  # merged in pieces that are always small enough
        nbytes = spec_of(plan, sources).nbytes
        numel = math.prod(plan.shape)
        inputs = numel * bytes_per_element(plan, sources)
        # Four float32 copies of every input, and eight of the result.
        most = NUM_BUFFERS * memory.buffer_bytes + nbytes + inputs + 16 * numel * (len(plan.inputs) + 2)
        if memory.held_bytes + most > memory.budget:
            _prepare(plan, sources, memory, device)


def _write_tensor(
    plan: TensorPlan,
    sources: Mapping[str, Checkpoint],
    stream: TensorStream,
    memory: Memory,
    device: str,
) -> Iterator[int]:
    """Merge and hand over a tensor by torch; yields the bytes of every chunk."""
    import torch

    prepared = _prepare(plan, sources, memory, device)
    step = memory.chunk(prepared)
    for first in range(0, prepared.numel, step):
        count = min(step, prepared.numel - first)
        nbytes = count * prepared.dtype.itemsize
        straight = device == "cpu" and nbytes <= stream.buffer_bytes
        buffer = stream.buffer() if straight else None
        if buffer is not None:
            out = buffer.tensor(prepared.dtype, count)
        else:
            out = torch.empty(count, dtype=prepared.dtype, device=device)
        if not prepared.write(out, first):
            raise not_finite(plan, sources)
        if buffer is not None:
            stream.put(buffer, nbytes)
        else:
            stream.write(out)
        _release(plan, sources, first, count)
        yield nbytes


def _prepare(
    plan: TensorPlan, sources: Mapping[str, Checkpoint], memory: Memory, device: str
) -> PreparedTensor:
    # A bank of its own, as what a bank knows of tensors it keeps.
    prepared = prepare_tensor(plan, Bank(sources, device=device, budget=memory.budget))
    # Statistics, and copies to another device, read all of the inputs.
    _release(plan, sources)
    memory.check(plan, prepared, sources)
    return prepared


def _release(
    plan: TensorPlan, sources: Mapping[str, Checkpoint], first: int = 0, count: int | None = None
) -> None:
    for model, name in plan.inputs:
        sources[model].release(name, first, count)


class _ReadAhead:
    """Keeps the reading `distance` bytes of output ahead of the merge."""

    def __init__(self, prefetches: Iterator[int], distance: int) -> None:
        self._prefetches = prefetches
        self._distance = distance
        self._reached = 0

    def move_to(self, done: int) -> None:
        while self._reached < done + self._distance:
            reached = next(self._prefetches, None)
            if reached is None:
                return
            self._reached = reached


def _prefetches(plans: Sequence[TensorPlan], sources: Mapping[str, Checkpoint], nbytes: int) -> Iterator[int]:
    """Has the system read the inputs of the next `nbytes` of output; yields how far that reaches."""
    reached = 0
    for plan in plans:
        spec = spec_of(plan, sources)
        step = max(1, nbytes // spec.stored.itemsize)
        for first in range(0, math.prod(plan.shape), step):
            for model, name in plan.inputs:
                sources[model].prefetch(name, first, step)
            reached += min(step, math.prod(plan.shape) - first) * spec.stored.itemsize
            yield reached
