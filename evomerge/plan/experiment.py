"""The plan of an experiment: what a run will take, before any of it is started."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.errors import ConfigurationError
from evomerge.fitness.constraints import needs_sources
from evomerge.fitness.stock import batch_size
from evomerge.plan.batch_size import load_of, memory_needs, survey_all, with_batch_size
from evomerge.plan.candidates import Candidates
from evomerge.plan.machine import Load, measure
from evomerge.plan.models import dtype_of, model_entry
from evomerge.plan.needs import disk_needs, multiplied_parameters, pool_bytes, read_config
from evomerge.plan.records import (
    CandidateEntry,
    EvaluationsEntry,
    ExperimentPlan,
    Machine,
    MemoryEntry,
    Span,
    TaskEntry,
    TimesEntry,
    WorkersEntry,
)
from evomerge.plan.times import (
    INLINE_SECONDS,
    MERGE_SLOWDOWN,
    RAY_SECONDS,
    Work,
    candidate_seconds,
    scoring_seconds,
    search_seconds,
    statistics_seconds,
    total,
)
from evomerge.plan.tokens import TaskLoad
from evomerge.plan.warn import warnings_of
from evomerge.prepare import PreparedRun
from evomerge.rivals import model_labels, same_depth, single_scale
from evomerge.workers import PROCESS_BYTES

Measure = Callable[[Load], Machine]

RACING_SHARE = 0.2
"""Share of a generation that is scored on all documents at least, where the others stop after the first block."""

DEFAULT_WIDTH = 1024
"""Width of hidden states where the config does not tell."""


def plan_experiment(prepared: PreparedRun, *, measured: Measure = measure) -> ExperimentPlan:
    """Plan an experiment.

    Args:
        prepared: The experiment.
        measured: Measures the machine.

    Raises:
        ConfigurationError: The experiment names a device that this machine has not.
    """
    _check_device(prepared.spec.device)
    prepared = with_batch_size(prepared)
    stages = survey_all(prepared)
    search, holdout = (
        load_of(prepared, documents) for documents in (prepared.search_documents, prepared.holdout_documents)
    )
    memory = memory_needs(prepared, stages, search + holdout)
    workers = _workers(prepared, memory)
    machine = measured(_to_measure(prepared, workers, memory, search))
    evaluations = _evaluations(prepared)
    candidates = [candidate_seconds(_work(prepared, stage), search, machine) for stage in stages]
    plan = ExperimentPlan(
        name=prepared.experiment.name,
        models=tuple(
            model_entry(label, prepared.checkpoints[name]) for name, label in model_labels(prepared).items()
        ),
        stages=tuple(stage.entry for stage in stages),
        tasks=tuple(_tasks(prepared)),
        workers=workers,
        memory=memory,
        disk=disk_needs(
            prepared,
            statistics=sum(each.bytes for stage in stages for each in stage.statistics),
            stage_parameters=[stage.entry.parameters.first_generation_most for stage in stages],
            # What is scored a second time is scored in two halves.
            num_searched=evaluations.search + 2 * evaluations.confirm + evaluations.baselines,
            num_final=evaluations.holdout,
            folder=Path("runs") / prepared.experiment.name,
        ),
        evaluations=evaluations,
        candidate=CandidateEntry(
            requests=search.requests,
            prompt_tokens=search.prompt_tokens,
            new_tokens=search.new_tokens,
            seconds=Span(
                low=min(span.low for span in candidates), high=max(span.high for span in candidates)
            ),
        ),
        seconds=_times(prepared, stages, candidates, workers, memory, evaluations, search, holdout, machine),
        machine=machine,
        warnings=(),
    )
    return replace(plan, warnings=tuple(warnings_of(plan, prepared)))


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.device_count():
        raise ConfigurationError(
            f"evaluation.device: expected a device of this machine, which has no GPU, got {device!r}; plan where the "
            "run is to be, or with --set evaluation.device=cpu"
        )


def _tasks(prepared: PreparedRun) -> Iterator[TaskEntry]:
    held_out = {item.name: item for item in prepared.holdout_documents}
    for item in prepared.search_documents:
        holdout = held_out.get(item.name)
        yield TaskEntry(
            task=item.task,
            search_documents=len(item.doc_ids),
            holdout_task=None if holdout is None else holdout.task,
            holdout_documents=0 if holdout is None else len(holdout.doc_ids),
        )


def _workers(prepared: PreparedRun, memory: MemoryEntry) -> WorkersEntry:
    """The workers that a pool would start here; as `build_pool` and `RayPool` decide it."""
    settings = prepared.experiment.workers
    limits = {"cores": (os.cpu_count() or 1) // settings.threads}
    limits["memory"] = memory.host_available // (PROCESS_BYTES + pool_bytes(prepared))
    if prepared.spec.device.startswith("cuda"):
        import torch

        each = 1.0 if settings.gpus_per_worker == "auto" else settings.gpus_per_worker
        if each:
            limits["GPUs"] = int(torch.cuda.device_count() // each)
    limit = min(limits, key=lambda name: limits[name])
    count = max(1, limits[limit])
    if settings.backend == "inline":
        limit, count = "workers.backend", 1
    elif settings.count != "auto":
        limit, count = "workers.count", settings.count
    return WorkersEntry(
        count=count,
        limit=limit,
        device=prepared.spec.device,
        threads=prepared.spec.threads,
        batch_size=batch_size(prepared.experiment.evaluation),
    )


def _to_measure(prepared: PreparedRun, workers: WorkersEntry, memory: MemoryEntry, search: TaskLoad) -> Load:
    donor = prepared.checkpoints[prepared.spec.donor]
    config = read_config(donor)
    dtype = prepared.experiment.evaluation.dtype
    return Load(
        device=workers.device,
        dtype=dtype_of(donor) if dtype == "auto" else dtype,
        width=DEFAULT_WIDTH if config is None else config.hidden_size,
        weight_bytes=memory.live_model,
        rows=max((batch.rows for batch in search.batches), default=1),
        workers=workers.count,
        threads=workers.threads,
    )


def _evaluations(prepared: PreparedRun) -> EvaluationsEntry:
    """What `finish` scores beside the candidates."""
    experiment, sources = prepared.experiment, len(model_labels(prepared))
    refers = experiment.evaluation.racing is not None
    refers |= needs_sources(prepared.objectives, prepared.constraints)
    scales, models = 0, 0
    if prepared.holdout_documents:
        scales = len(single_scale(prepared))
        # The winner, the sources, the winners of the other stages, the average, the best scale.
        models = 1 + sources + len(prepared.stages) - 1 + same_depth(prepared) + (scales > 0)
    return EvaluationsEntry(
        search=experiment.evaluations,
        confirm=min(experiment.finish.confirm, experiment.evaluations),
        baselines=scales + (sources if refers else 0),
        holdout=models,
    )


def _work(prepared: PreparedRun, stage: Candidates) -> Work:
    """A candidate like those of the first generation."""
    donor = prepared.checkpoints[prepared.spec.donor]
    return Work(
        parameters=multiplied_parameters(donor, stage.entry.parameters.first_generation),
        layers=stage.layers.first_generation,
        merged_bytes=None if stage.is_path else (stage.num_models + 1) * donor.nbytes,
    )


def _times(
    prepared: PreparedRun,
    stages: Sequence[Candidates],
    candidates: Sequence[Span],
    workers: WorkersEntry,
    memory: MemoryEntry,
    evaluations: EvaluationsEntry,
    search: TaskLoad,
    holdout: TaskLoad,
    machine: Machine,
) -> TimesEntry:
    loading = MERGE_SLOWDOWN * (memory.live_model / machine.bytes_per_second)
    inline = prepared.experiment.workers.backend == "inline"
    # Every stage has workers of its own, whose sources are the winners of the stages before, too.
    start = ((INLINE_SECONDS if inline else RAY_SECONDS) + loading) * len(stages)
    start += MERGE_SLOWDOWN * sum(statistics_seconds(stage.statistics) for stage in stages)
    searched = total(
        [
            search_seconds(
                candidate,
                evaluations=stage.entry.evaluations,
                population=stage.entry.population,
                workers=workers.count,
            )
            for stage, candidate in zip(stages, candidates, strict=True)
        ]
    )
    racing = prepared.experiment.evaluation.racing
    if racing is not None:
        searched = replace(
            searched, low=searched.low * (RACING_SHARE + (1 - RACING_SHARE) * racing.blocks[0])
        )
    model = _work(prepared, stages[-1])
    baseline = candidate_seconds(replace(model, merged_bytes=3.0 * memory.live_model), search, machine)
    final = loading + scoring_seconds(model, holdout, machine)
    again = candidates[-1] * math.ceil(evaluations.confirm / workers.count)
    finish = again + baseline * math.ceil(evaluations.baselines / workers.count)
    finish += final * math.ceil(evaluations.holdout / workers.count)
    return TimesEntry(start=start, search=searched, finish=finish, total=total([start, searched, finish]))
