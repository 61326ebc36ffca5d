"""Plans as aligned text, made to fit one screen of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from evomerge.plan.recipe_records import RecipePlan
from evomerge.plan.records import (
    ExperimentPlan,
    MemoryEntry,
    ModelEntry,
    Sizes,
    StageEntry,
    TaskEntry,
    WorkersEntry,
)
from evomerge.plan.words import count, durations, flops, size

WIDTH = 80
LABEL = 13
MOST_ROWS = 6
"""Models or tasks that are listed one by one; the rest is summed up."""


def plan_text(plan: ExperimentPlan | RecipePlan) -> str:
    """The plan in words."""
    lines = _recipe(plan) if isinstance(plan, RecipePlan) else _experiment(plan)
    return "\n".join(lines)


def _experiment(plan: ExperimentPlan) -> Iterator[str]:
    yield from _block(plan.name, [f"{plan.evaluations.search} candidates in {durations(plan.seconds.total)}"])
    yield from _block("models", _models(plan.models))
    for stage in plan.stages:
        yield from _block(f"stage {stage.name}" if len(plan.stages) > 1 else "search", _stage(stage))
    yield from _block("tasks", _tasks(plan.tasks))
    candidate = plan.candidate
    tokens = f"{count(candidate.prompt_tokens)} prompt tokens"
    if candidate.new_tokens.high:
        tokens += f" and at most {count(candidate.new_tokens.high)} new ones"
    yield from _block("candidate", [f"{tokens}: {durations(candidate.seconds)}"])
    kinds = {
        "candidates": plan.evaluations.search,
        "a second time": plan.evaluations.confirm,
        "baselines": plan.evaluations.baselines,
        "held-out": plan.evaluations.holdout,
    }
    yield from _block("evaluations", [", ".join(f"{number} {kind}" for kind, number in kinds.items())])
    yield from _block("workers", [_workers(plan.workers)])
    yield from _block("memory", _memory(plan.memory, plan.workers))
    disk = plan.disk
    parts = {
        "statistics": disk.statistics,
        "scores": disk.scores,
        "winner": disk.winner,
        "stages": disk.stages,
    }
    named = ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part)
    yield from _block("disk", [f"{size(disk.total)} of {size(disk.available)} free: {named}"])
    times = plan.seconds
    yield from _block(
        "time",
        [
            f"start {durations(times.start)}, search {durations(times.search)}, finish {durations(times.finish)}"
        ],
    )
    machine = plan.machine
    yield from _block(
        "",
        [
            f"Rough: measured {flops(machine.prompt_flops)} for prompts, {flops(machine.decode_flops)} "
            f"for new tokens and {size(machine.bytes_per_second)}/s per worker; no other load, answers between the "
            "length of the tasks' own and the token limit."
        ],
    )


def _recipe(plan: RecipePlan) -> Iterator[str]:
    result, memory, disk = plan.result, plan.memory, plan.disk
    yield from _block(plan.method, [f"{count(result.parameters)} parameters in {durations(plan.seconds)}"])
    yield from _block("models", _models(plan.models))
    files = f"{result.shards} file{'s' if result.shards > 1 else ''}"
    rest = f"{result.tensors} tensors, {result.dtype}, {size(result.bytes)} in {files}"
    if len(result.modules) > 1:
        parts = [f"{name} of {n} layers" if n else name for name, n in result.modules.items()]
        yield from _block("result", [", ".join(parts), rest])
    else:
        yield from _block("result", [f"{result.layers} layers, {rest}"])
    yield from _block(
        "memory",
        [
            f"{size(memory.default)} of weights at once and {size(memory.process)} for the process, of "
            f"{size(memory.available)} free; --memory-budget {size(memory.smallest_budget).replace(' ', '')} is the "
            "smallest that works"
        ],
    )
    yield from _block(
        "disk", [f"reads {size(disk.read)}, writes {size(disk.written)} of {size(disk.available)} free here"]
    )
    yield from _block(
        "time",
        [
            f"Rough: measured {size(plan.machine.bytes_per_second)}/s in memory; models "
            "in the system's cache, or on a disk of 200 MB/s."
        ],
    )


def _block(label: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines behind a label; what is too long is wrapped."""
    if len(label) >= LABEL:
        yield label
        label = ""
    for number, line in enumerate(lines):
        head = label if number == 0 else ""
        yield from textwrap.wrap(
            line,
            WIDTH,
            initial_indent=f"{head:<{LABEL}}",
            subsequent_indent=" " * LABEL,
            drop_whitespace=True,
        )


def _models(models: Sequence[ModelEntry]) -> Iterator[str]:
    shown = models if len(models) <= MOST_ROWS else models[: MOST_ROWS - 1]
    width = max(len(model.name) for model in shown)
    for model in shown:
        parameters = f"{count(model.parameters):>7} parameters"
        yield f"{model.name:<{width}}  {parameters}, {model.layers} layers, {model.dtype}, {size(model.bytes)}"
    rest = models[len(shown) :]
    if rest:
        yield f"and {len(rest)} more, {size(sum(model.bytes for model in rest))}"


def _stage(stage: StageEntry) -> Iterator[str]:
    kinds = [f"{number} {kind}" for kind, number in stage.dimensions.items() if number]
    yield f"{stage.space} space, dimensions: {', '.join(kinds)}"
    plural = "s" if stage.generations > 1 else ""
    yield f"{stage.algorithm}, {stage.generations} generation{plural} of {stage.population}"
    if stage.hops is not None:
        yield f"hops: {_sizes(stage.hops)}"
        yield f"parameters: {_sizes(stage.parameters)}"


def _sizes(sizes: Sizes) -> str:
    first = round(sizes.first_generation)
    return f"{count(sizes.start)} at the start, {count(first)} early on, {count(sizes.most)} at most"


def _tasks(tasks: Sequence[TaskEntry]) -> Iterator[str]:
    shown = tasks if len(tasks) <= MOST_ROWS else tasks[: MOST_ROWS - 1]
    width = max(len(task.task) for task in shown)
    for task in shown:
        yield f"{task.task:<{width}}  {_documents([task])}"
    rest = tasks[len(shown) :]
    if rest:
        yield f"and {len(rest)} more: {_documents(rest)}"


def _documents(tasks: Sequence[TaskEntry]) -> str:
    searched = sum(task.search_documents for task in tasks)
    held_out = sum(task.holdout_documents for task in tasks)
    return f"{searched} documents to search on, {held_out or 'none'} held out"


def _workers(workers: WorkersEntry) -> str:
    threads = f"{workers.threads} thread{'s' if workers.threads > 1 else ''}"
    where = "the CPU" if workers.device == "cpu" else workers.device
    count = f"{workers.count} on {where}, {threads} each (decided by {workers.limit})"
    return f"{count}; batches of {workers.batch_size}"


def _memory(memory: MemoryEntry, workers: WorkersEntry) -> Iterator[str]:
    parts = {"process": memory.process, "live model": memory.live_model, "beside it": memory.working}
    if memory.scoring is not None:
        parts["scoring"] = memory.scoring
    on_gpu = workers.device != "cpu"
    if on_gpu:
        del parts["process"]
        parts["sources"] = memory.sources
    named = ", ".join(f"{name} {size(part)}" for name, part in parts.items())
    yield f"{size(memory.device if on_gpu else memory.host)} per worker: {named}"
    if on_gpu:
        yield f"of {size(memory.device_available)} free on each GPU"
    total = f"{size(workers.count * memory.host)} of {size(memory.host_available)} free"
    yield (
        f"{total} in main memory" if on_gpu else f"{total}; sources {size(memory.sources)}, mapped and shared"
    )
