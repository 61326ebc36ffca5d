"""The batch size behind `evaluation.batch_size: auto`: found once, before the first candidate, then fixed.

It is the largest power of two, up to where larger batches were no faster, whose longest batch fits a worker's share
of the machine's memory. It rests on what the machine has, not on what is free or on how long anything takes, so it is
the same for the same experiment on the same machine; a run records it and goes on with it on any other. A probe could
not promise that, and in bfloat16 scores move with the batch size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.own import reads_text
from evomerge.fitness.stock import AUTO_BATCH_SIZE
from evomerge.plan.candidates import Candidates, survey
from evomerge.plan.needs import pool_bytes, worker_needs
from evomerge.plan.records import MemoryEntry
from evomerge.plan.tokens import TaskLoad, total_load
from evomerge.prepare import PreparedRun
from evomerge.workers import PROCESS_BYTES

LARGEST = 64
"""Larger batches were not measured to be faster; see docs/decisions/0001-batch-size.md."""

SHARE = 0.75
"""Share of the memory that workers may take; sources are cached in the rest."""


def with_batch_size(prepared: PreparedRun, *, memory: Callable[[str], int] | None = None) -> PreparedRun:
    """The same with the batch size found, if the experiment leaves it open.

    Args:
        prepared: The experiment.
        memory: Bytes that a device has; by default this machine's.
    """
    if prepared.experiment.evaluation.batch_size != "auto":
        return prepared
    available = (memory or memory_of)(prepared.spec.device) * SHARE
    if not available:  # the GPUs are on other machines of a Ray cluster
        return _fixed(prepared, AUTO_BATCH_SIZE)
    sharing = _sharing(prepared, available)
    found = LARGEST
    stages = survey_all(prepared)
    load = load_of(prepared, (*prepared.search_documents, *prepared.holdout_documents))
    while found > 1:
        tried = _fixed(prepared, found)
        needs = memory_needs(tried, stages, load.in_batches_of(found))
        if needs.scoring is None:  # the config does not tell
            return _fixed(prepared, AUTO_BATCH_SIZE)
        needed = needs.device if tried.spec.device.startswith("cuda") else needs.host
        if sharing * needed <= available:
            return tried
        found //= 2
    return _fixed(prepared, found)


def survey_all(prepared: PreparedRun) -> list[Candidates]:
    """Candidates as they are to be expected in every search."""
    known = dict(prepared.checkpoints)
    found = []
    for stage, settings in zip(prepared.stages, prepared.experiment.searches, strict=True):
        candidates, known[stage.name] = survey(stage, settings, known)
        found.append(candidates)
    return found


def load_of(prepared: PreparedRun, documents: Sequence[DocumentSet]) -> TaskLoad:
    """What scoring documents of an experiment asks of a model.

    Functions that are given the model are left out: only they know what they ask of it.
    """
    left_out = {(item.task, item.metric) for item in prepared.spec.own if not reads_text(item)}
    metrics = {
        task: [pair for pair in pairs if (task, pair[0]) not in left_out]
        for task, pairs in prepared.spec.metrics.items()
    }
    donor = prepared.checkpoints[prepared.spec.donor]
    return total_load(documents, prepared.library, metrics, prepared.experiment.evaluation, donor)


def memory_needs(prepared: PreparedRun, stages: list[Candidates], load: TaskLoad) -> MemoryEntry:
    """Memory of one worker.

    Args:
        prepared: The experiment.
        stages: Its candidates.
        load: What they are scored on.
    """
    return worker_needs(
        prepared,
        load,
        most_parameters=max(stage.entry.parameters.first_generation_most for stage in stages),
        most_layers=max(stage.layers.first_generation_most for stage in stages),
    )


def memory_of(device: str) -> int:
    """Bytes of memory that a device has; of several GPUs that of the smallest, 0 if there is none here."""
    if device.startswith("cuda"):
        import torch

        count = torch.cuda.device_count()
        return min(
            (int(torch.cuda.get_device_properties(index).total_memory) for index in range(count)), default=0
        )
    return min(_main_memory())


def _main_memory() -> Iterator[int]:
    yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        yield int(text)


def _sharing(prepared: PreparedRun, available: float) -> int:
    """Workers that share the memory of a device, as far as that does not depend on what is free."""
    settings = prepared.experiment.workers
    if settings.backend == "inline":
        return 1
    if prepared.spec.device.startswith("cuda"):
        share = 1.0 if settings.gpus_per_worker == "auto" else settings.gpus_per_worker
        return max(1, int(1 / share)) if share else 1
    if settings.count != "auto":
        return settings.count
    fitting = int(available // (PROCESS_BYTES + pool_bytes(prepared)))
    return max(1, min((os.cpu_count() or 1) // settings.threads, fitting))


def _fixed(prepared: PreparedRun, size: int) -> PreparedRun:
    evaluation: EvaluationSettings = prepared.experiment.evaluation.model_copy(update={"batch_size": size})
    return replace(
        prepared,
        experiment=prepared.experiment.model_copy(update={"evaluation": evaluation}),
        spec=replace(prepared.spec, evaluation=evaluation),
    )
