"""The plan of a recipe: what merging it will take.

Every tensor is prepared as for the merge itself, but with tensors that have no values, so that its need of
memory is that of the merge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.shards import plan_shards
from evomerge.errors import ConfigurationError
from evomerge.merge.execute import PreparedTensor, prepare_tensor
from evomerge.merge.load import LoadedRecipe
from evomerge.merge.memory import Memory, bytes_per_element, spec_of
from evomerge.merge.plan import TensorPlan
from evomerge.merge.vocabulary import align_vocabularies
from evomerge.plan.header_bank import HeaderBank
from evomerge.plan.machine import Load, measure
from evomerge.plan.models import model_entry
from evomerge.plan.needs import free_disk
from evomerge.plan.recipe_records import MergeDisk, MergeMemory, RecipePlan, ResultEntry
from evomerge.plan.records import Machine, Span
from evomerge.plan.times import statistics_seconds
from evomerge.plan.words import size
from evomerge.spaces.base import short_names
from evomerge.workers import available_memory

SHARD_BYTES = 5 * 10**9
"""What `evomerge merge` fills files up to unless told otherwise."""

PROCESS_BYTES = 350 * 10**6
"""A process that merges, without weights."""

START_SECONDS = Span(low=2.0, high=5.0)
"""Starting Python and compiling kernels."""

DISK_BYTES_PER_SECOND = 2e8
"""A slow disk; what is in the system's cache is read as fast as memory."""

FORMULA_SECONDS_PER_BYTE = 2e-8
"""Time per byte read of methods without a kernel."""

Measure = Callable[[Load], Machine]
Prepared = Sequence[tuple[TensorPlan, PreparedTensor]]


def plan_recipe(loaded: LoadedRecipe, *, measured: Measure = measure) -> RecipePlan:
    """Plan a merge.

    Args:
        loaded: The recipe with its models.
        measured: Measures the machine.
    """
    sources = align_vocabularies(loaded.recipe, loaded.checkpoints).checkpoints
    bank = HeaderBank(sources)
    prepared = [(plan, prepare_tensor(plan, bank)) for plan in loaded.plan.tensors]
    shards = plan_shards([spec_of(plan, sources) for plan, _ in prepared], SHARD_BYTES)
    read = sum(math.prod(plan.shape) * bytes_per_element(plan, sources) for plan, _ in prepared)
    written = sum(shard.nbytes for shard in shards)
    dtypes: Counter[str] = Counter()
    for plan, _ in prepared:
        dtypes[spec_of(plan, sources).dtype] += math.prod(plan.shape)
    machine = measured(
        Load(device="cpu", dtype="float32", width=1024, weight_bytes=1 << 24, rows=1, workers=1, threads=1)
    )
    memory = MergeMemory(
        process=PROCESS_BYTES,
        default=_needed(prepared, sources, None),
        smallest_budget=_smallest_budget(prepared, sources),
        available=available_memory(),
    )
    disk = MergeDisk(read=read, written=written, available=free_disk(Path.cwd()))
    return RecipePlan(
        method=loaded.recipe.merge_method,
        models=tuple(
            model_entry(label, loaded.checkpoints[name])
            for name, label in short_names(loaded.recipe.model_names).items()
        ),
        result=ResultEntry(
            parameters=sum(math.prod(plan.shape) for plan, _ in prepared),
            dtype=dtypes.most_common(1)[0][0],
            bytes=written,
            layers=loaded.plan.num_layers,
            modules={module.name: len(module.layers) for module in loaded.plan.modules},
            tensors=len(prepared),
            shards=len(shards),
        ),
        memory=memory,
        disk=disk,
        seconds=_seconds(prepared, sources, bank, disk, machine),
        machine=machine,
        warnings=(*map(str, loaded.warnings), *_warnings(memory, disk)),
    )


def _needed(prepared: Prepared, sources: Mapping[str, Checkpoint], budget: int | None) -> int:
    """Bytes of weights in memory at once.

    Raises:
        ConfigurationError: The budget is too small for any merge of these models.
    """
    memory = Memory.plan([plan for plan, _ in prepared], sources, budget)
    return max(memory.needed(plan, tensor, sources) for plan, tensor in prepared)


def _smallest_budget(prepared: Prepared, sources: Mapping[str, Checkpoint]) -> int:
    """The smallest budget that holds what it leads to, two digits of it; found by halving."""
    # Tensors that need the same stand for each other.
    kinds = {
        (tensor.numel, tensor.divisible, tensor.workspace_bytes, bytes_per_element(plan, sources)): (
            plan,
            tensor,
        )
        for plan, tensor in prepared
    }
    few = list(kinds.values())
    low, high = 0, 2 * _needed(prepared, sources, None)
    while high - low > max(1000, high // 1000):
        budget = (low + high) // 2
        try:
            fits = _needed(few, sources, budget) <= budget
        except ConfigurationError:
            fits = False
        low, high = (low, budget) if fits else (budget, high)
    step = int(10.0 ** (len(str(high)) - 2))
    return math.ceil(high / step) * step


def _seconds(
    prepared: Prepared, sources: Mapping[str, Checkpoint], bank: HeaderBank, disk: MergeDisk, machine: Machine
) -> Span:
    """Reading, merging and writing overlap, so the slowest of them counts; statistics read everything first."""
    statistics = statistics_seconds(bank.asked.values())
    passes = 2 if statistics else 1
    formula = sum(
        math.prod(plan.shape) * bytes_per_element(plan, sources)
        for plan, tensor in prepared
        if tensor.operation is None and plan.dtype is not None
    )
    copied = (passes * disk.read + disk.written) / machine.bytes_per_second
    computed = copied + statistics + formula * FORMULA_SECONDS_PER_BYTE
    stored = (passes * disk.read + disk.written) / DISK_BYTES_PER_SECOND
    return START_SECONDS + Span(low=computed, high=max(3 * computed, stored))


def _warnings(memory: MergeMemory, disk: MergeDisk) -> list[str]:
    found = []
    if disk.written > disk.available:
        found.append(f"disk: the checkpoint needs {size(disk.written)}, {size(disk.available)} is free here")
    if memory.process + memory.default > memory.available:
        found.append(
            f"memory: {size(memory.process + memory.default)} is needed, {size(memory.available)} is free; "
            f"--memory-budget can be as small as {size(memory.smallest_budget)}"
        )
    return found
