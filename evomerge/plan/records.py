"""What the plan of an experiment says, as frozen records; `evomerge plan --json` prints the same.

Sizes are in bytes, times in seconds. docs/plan.md describes every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Span:
    """A number that is only known to lie between two others."""

    low: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(low=self.low + other.low, high=self.high + other.high)

    def __mul__(self, factor: float) -> Span:
        return Span(low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A source model or the base.

    Attributes:
        name: As recipes name it.
        parameters: Number of its parameters.
        dtype: Type it is stored in, as torch names it; the most frequent of several.
        bytes: Size of its tensors.
        layers: Number of its layers.
    """

    name: str
    parameters: int
    dtype: str
    bytes: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A number that differs between candidates.

    Attributes:
        start: Of the candidate that the search starts from.
        first_generation: Mean over the first generation.
        first_generation_most: The largest of the first generation.
        most: The largest there can be.
    """

    start: int
    first_generation: float
    first_generation_most: int
    most: int


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One search.

    Attributes:
        name: Its name.
        space: Type of its search space.
        dimensions: Kind of dimension -> how many there are.
        algorithm: Its searcher.
        population: Candidates of a generation.
        generations: Number of generations, the last perhaps incomplete.
        evaluations: Candidates in all.
        hops: Layers of a candidate, where the search moves layers; else None.
        parameters: Parameters of a candidate.
    """

    name: str
    space: str
    dimensions: Mapping[str, int]
    algorithm: str
    population: int
    generations: int
    evaluations: int
    hops: Sizes | None
    parameters: Sizes


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One task.

    Attributes:
        task: Its name.
        search_documents: Documents that candidates are scored on.
        holdout_task: Task whose documents judge the result, or None when none were kept.
        holdout_documents: Number of these.
    """

    task: str
    search_documents: int
    holdout_task: str | None
    holdout_documents: int


@dataclass(frozen=True, kw_only=True)
class WorkersEntry:
    """The workers that this machine would start.

    Attributes:
        count: How many.
        limit: What decides it: `workers.count`, `workers.backend`, `cores`, `memory` or `GPUs`.
        device: Where their models are.
        threads: CPU threads of each.
        batch_size: Prompts that go through the model together; what the experiment leaves open is found.
    """

    count: int
    limit: str
    device: str
    threads: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class MemoryEntry:
    """What one worker holds.

    Attributes:
        process: Python, torch and the other libraries.
        live_model: The resident model.
        working: What lies beside it at most: copies of tensors while they are merged, or a second model while a
            checkpoint is scored.
        scoring: Keys and values of one batch, and its logits; None where the config does not tell.
        sources: The source models: on the CPU mapped files, shared by all workers and given back when memory is
            short; on a GPU copies of its own.
        host: Main memory it needs in all, mapped files apart.
        device: GPU memory it needs in all; 0 on the CPU.
        host_available: Main memory that is free.
        device_available: GPU memory that is free on the smallest GPU; 0 on the CPU.
    """

    process: int
    live_model: int
    working: int
    scoring: int | None
    sources: int
    host: int
    device: int
    host_available: int
    device_available: int


@dataclass(frozen=True, kw_only=True)
class DiskEntry:
    """What the run directory takes.

    Attributes:
        statistics: Statistics of the sources, at most.
        scores: Scores per document, the journal included.
        winner: The winner's checkpoint; unless it is kept, for the time of its scoring.
        stages: Checkpoints of the winners of the stages before the last.
        total: All of it.
        available: What is free.
    """

    statistics: int
    scores: int
    winner: int
    stages: int
    total: int
    available: int


@dataclass(frozen=True, kw_only=True)
class EvaluationsEntry:
    """How many models are scored.

    Attributes:
        search: Candidates.
        confirm: Candidates that are scored a second time before the winner is named.
        baselines: Other models that are scored on the search documents: baselines that are tried, and the source
            models where a search refers to their scores.
        holdout: Models that are scored on the held-out documents.
    """

    search: int
    confirm: int
    baselines: int
    holdout: int


@dataclass(frozen=True, kw_only=True)
class CandidateEntry:
    """What scoring one candidate takes.

    Attributes:
        requests: Number of prompts.
        prompt_tokens: Their tokens.
        new_tokens: Generated tokens, if answers are short and if all are as long as they may be.
        seconds: Time on one worker.
    """

    requests: int
    prompt_tokens: int
    new_tokens: Span
    seconds: Span


@dataclass(frozen=True, kw_only=True)
class TimesEntry:
    """How long a run takes.

    Attributes:
        start: Starting the workers, and computing statistics of the sources.
        search: All candidates.
        finish: What is scored a second time, the baselines and the held-out documents.
        total: All of it.
    """

    start: Span
    search: Span
    finish: Span
    total: Span


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one worker computes with while all of them are busy, by a short measurement.

    Attributes:
        prompt_flops: Floating-point operations per second of a product with many rows, as of prompts.
        decode_flops: The same with one row per prompt of a batch, as for one new token each: less where reading
            the weights takes longer than computing with them.
        bytes_per_second: Bytes read and written per second.
        call_seconds: Time of one small operation.
    """

    prompt_flops: float
    decode_flops: float
    bytes_per_second: float
    call_seconds: float


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan:
    """What an experiment will take."""

    kind: str = "experiment"
    name: str
    models: tuple[ModelEntry, ...]
    stages: tuple[StageEntry, ...]
    tasks: tuple[TaskEntry, ...]
    workers: WorkersEntry
    memory: MemoryEntry
    disk: DiskEntry
    evaluations: EvaluationsEntry
    candidate: CandidateEntry
    seconds: TimesEntry
    machine: Machine
    warnings: tuple[str, ...]
