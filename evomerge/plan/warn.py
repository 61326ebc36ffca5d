"""What a plan warns of: things that work, but hardly as meant, or not on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from evomerge.plan.records import ExperimentPlan, StageEntry
from evomerge.plan.words import count, duration, size
from evomerge.prepare import PreparedRun


def warnings_of(plan: ExperimentPlan, prepared: PreparedRun) -> Iterator[str]:
    """Warn of what a plan shows.

    Args:
        plan: The plan.
        prepared: The experiment.
    """
    yield from prepared.warnings
    yield from _memory(plan, prepared)
    yield from _size(plan)
    if plan.disk.total > plan.disk.available:
        yield (
            f"disk: the run needs {size(plan.disk.total)}, {size(plan.disk.available)} is free; choose another "
            "--run-dir"
        )
    for stage, settings in zip(plan.stages, prepared.experiment.searches, strict=True):
        place = f"stages: {settings.name}: search" if prepared.experiment.stages else "search"
        yield from _budget(stage, place, plan.workers.count)
    timeout = prepared.experiment.workers.timeout
    if plan.candidate.seconds.high > timeout and prepared.experiment.workers.backend == "ray":
        yield (
            f"workers.timeout: a candidate may take {duration(plan.candidate.seconds.high)} and is given up after "
            f"{duration(timeout)}"
        )
    own = dict.fromkeys(item.metric for item in prepared.spec.own)
    if own:
        yield f"the time that {', '.join(own)} takes is not known, so it is not counted"
    if not plan.evaluations.holdout:
        yield "evaluation.holdout: no documents are held out, so nothing can be said beyond the search"


def _size(plan: ExperimentPlan) -> Iterator[str]:
    """Candidates may grow beyond those of the first generation, which the plan counts on."""
    memory = plan.memory
    on_gpu = plan.workers.device != "cpu"
    needed, available = (
        (memory.device, memory.device_available) if on_gpu else (memory.host, memory.host_available)
    )
    per_parameter = memory.live_model / max(1, max(model.parameters for model in plan.models))
    for stage in plan.stages:
        largest = round(stage.parameters.most * per_parameter)
        if largest > memory.working and needed - memory.working + largest > available:
            yield (
                f"{stage.name}: the largest path has {count(stage.parameters.most)} parameters, {size(largest)}, "
                "more than fits; max_hops or max_parameters of the search space limits it"
            )


def _memory(plan: ExperimentPlan, prepared: PreparedRun) -> Iterator[str]:
    workers, memory = plan.workers, plan.memory
    needed = workers.count * memory.host
    if needed > memory.host_available:
        each = (
            f"{workers.count} workers need {size(needed)}"
            if workers.count > 1
            else f"a worker needs {size(needed)}"
        )
        yield (
            f"memory: {each}, {size(memory.host_available)} is free; set workers.count, a smaller "
            "evaluation.batch_size or a smaller type"
        )
    elif workers.device == "cpu" and needed + memory.sources > memory.host_available:
        yield (
            f"memory: the sources, {size(memory.sources)}, do not fit beside the workers, so they are read from the "
            "disk again and again"
        )
    if workers.device == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    asked = prepared.experiment.workers.gpus_per_worker
    share = 1.0 if asked == "auto" else asked
    if workers.count * share > found:
        yield f"workers.count: {workers.count} workers ask for {workers.count * share:g} GPUs, there are {found}"
    on_each = max(1, int(1 / share)) if share else workers.count
    if on_each * memory.device > memory.device_available:
        yield (
            f"GPU memory: {on_each * memory.device / 1e9:.1f} GB needed on each GPU, {size(memory.device_available)} "
            "is free; set workers.memory_budget, a smaller evaluation.batch_size or fewer workers per GPU"
        )


def _budget(stage: StageEntry, place: str, workers: int) -> Iterator[str]:
    rest = stage.evaluations % stage.population
    if stage.evaluations < stage.population:
        yield (
            f"{place}.evaluations: {stage.evaluations} are fewer than the {stage.population} candidates of one "
            "generation, so the searcher never learns"
        )
    elif rest:
        fitting = stage.evaluations - rest
        yield (
            f"{place}.evaluations: the last generation has {rest} of its {stage.population} candidates; {fitting} or "
            f"{fitting + stage.population} fit"
        )
    if workers > stage.population:
        yield (
            f"{workers} workers for generations of {stage.population}: {workers - stage.population} of them have "
            f"nothing to do; set workers.count, or {place}.population"
        )
