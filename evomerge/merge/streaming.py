"""Merges a plan's tensors into a checkpoint's weight files, chunk by chunk, within a memory budget.

    source pages ──► merge a chunk ──► buffer ──► writer thread ──► disk
        ▲   │
  prefetch  release

While one chunk is merged, the system reads the next ones and the writer's thread writes the one before. The
pages of the sources are given back chunk by chunk, so what is in memory does not grow with the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.stream import NUM_BUFFERS, TensorStream
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.execute import Bank, PreparedTensor, is_finite, prepare_tensor
from evomerge.merge.memory import GRAIN, Memory, bytes_per_element, spec_of
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
        ordered = [by_name[spec.name] for spec in stream.tensors]
        ahead = _ReadAhead(
            _prefetches(ordered, sources, memory.buffer_bytes), LOOK_AHEAD * memory.buffer_bytes
        )
        for spec in stream.tensors:
            ahead.move_to(done)
            plan = by_name[spec.name]
            prepared = _prepare(plan, sources, memory, device)
            assert str(prepared.dtype) == f"torch.{spec.dtype}", "the header is written already"
            memory.check(plan, prepared, sources)
            for nbytes in _write_tensor(plan, prepared, sources, stream, memory, device):
                done += nbytes
                ahead.move_to(done)
                if progress is not None:
                    progress(done, total)


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
        nbytes = spec_of(plan, sources).nbytes
        numel = math.prod(plan.shape)
        inputs = numel * bytes_per_element(plan, sources)
        # Four float32 copies of every input, and eight of the result.
        most = NUM_BUFFERS * memory.buffer_bytes + nbytes + inputs + 16 * numel * (len(plan.inputs) + 2)
        if memory.held_bytes + most > memory.budget:
            memory.check(plan, _prepare(plan, sources, memory, device), sources)


def _write_tensor(
    plan: TensorPlan,
    prepared: PreparedTensor,
    sources: Mapping[str, Checkpoint],
    stream: TensorStream,
    memory: Memory,
    device: str,
) -> Iterator[int]:
    """Merge and hand over a tensor; yields the bytes of every chunk."""
    import torch

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


def not_finite(plan: TensorPlan, sources: Mapping[str, Checkpoint]) -> CheckpointError:
    """Say why a merged tensor holds NaN or infinity: a source does, or the merge overflowed."""
    for model, name in plan.inputs:
        flat = sources[model].tensor(name).view(-1)
        for first in range(0, flat.numel(), GRAIN):
            piece = flat[first : first + GRAIN]
            if not is_finite(piece):
                element = first + int((~piece.isfinite()).nonzero()[0])
                value = float(flat[element])
                reason = (
                    f"the merged tensor holds NaN or infinity, as {model} does: element {element} of {name} in "
                    f"{sources[model].tensors[name].file} is {value}; use an undamaged copy of the model, or "
                    "leave it out"
                )
                return CheckpointError(Fault(path=plan.name, reason=reason))
    reason = (
        f"the merged tensor holds NaN or infinity though the sources do not: the merge overflowed {plan.dtype}; "
        "use bfloat16 or float32 as out_dtype, or smaller parameters"
    )
    return CheckpointError(Fault(path=plan.name, reason=reason))
