"""The frozen records that cross process and file borders: dimensions, candidates, outcomes, trials.

Nothing here knows how a candidate is made, evaluated or stored; it only names what is passed around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Genome = tuple[float, ...]
"""The searched numbers of one candidate, in the units of the space's dimensions."""

Metrics = Mapping[str, Mapping[str, float]]
"""task -> metric -> aggregated value."""


class Kind(StrEnum):
    """What values a dimension takes."""

    CONTINUOUS = "continuous"
    INTEGER = "integer"
    """Whole numbers from `low` to `high`, whose order matters."""
    CATEGORICAL = "categorical"
    """Positions in `choices`, whose order says nothing."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched number or choice.

    Attributes:
        name: What the number controls, such as `weight[math]` or `density[kana].mlp`.
        low: Smallest value, inclusive; 0 for a choice.
        high: Largest value, inclusive; the position of the last choice for a choice.
        start: Value the search starts from.
        log: Whether equal steps of the search are equal ratios instead of equal differences.
        kind: What values it takes; integers and choices are whole numbers in a genome.
        choices: Names of the choices, for tables and messages; empty unless categorical.
    """

    name: str
    low: float
    high: float
    start: float
    log: bool = False
    kind: Kind = Kind.CONTINUOUS
    choices: tuple[str, ...] = ()


class Status(StrEnum):
    """How the evaluation of a candidate ended."""

    OK = "ok"
    INVALID = "invalid"
    """The candidate itself is unusable: non-finite weights or logits, a recipe that cannot be merged."""
    FAILED = "failed"
    """The machinery failed: out of memory, a dead worker, a timeout."""
    PRUNED = "pruned"
    """A race stopped the evaluation, as further documents would not have mattered; see `fitness.racing`."""
    UNAVAILABLE = "unavailable"
    """What scores candidates is out of reach. Never recorded: the run stops and can be resumed."""


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """Scores of the documents of one task, one column per metric.

    Attributes:
        doc_ids: Positions of the documents in the task's evaluation set, ascending.
        values: metric -> one score per document, in the order of `doc_ids`.
    """

    doc_ids: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What evaluating a candidate gave.

    Attributes:
        status: How the evaluation ended.
        reason: Why the status is not `ok`; empty otherwise.
        metrics: Aggregated metrics, empty unless `ok`.
        samples: task -> per-document scores, empty unless `ok`.
        seconds: Wall time per phase: `materialise`, `forward`, `other`, `total`.
        attempts: How many times the candidate was dispatched, retries included.
        counts: Tallies for the audit, such as `truncated` and `generations`.
    """

    status: Status
    reason: str = ""
    metrics: Metrics = field(default_factory=dict)
    samples: Mapping[str, SampleScores] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 1
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate with its outcome, as the journal keeps it.

    Attributes:
        number: Position in the order in which candidates were asked for, from 0.
        candidate: Hash of the canonical recipe.
        genome: The searched numbers.
        asked_after: How many trials the searcher had been told of when it proposed this one.
        status: How the evaluation ended.
        reason: Why the status is not `ok`.
        fitness: The number the searcher maximises: the fitness on all search documents if `ok`, an estimate of it
            if `pruned`, else None.
        standard_error: Standard error of the fitness over the documents it is from, or None if it is not known.
        metrics: task -> metric -> value.
        scores: File with the per-document scores, relative to the run directory, or empty.
        seconds: Wall time per phase.
        attempts: How many times the candidate was dispatched; 0 when its outcome is that of an earlier trial of
            the same candidate.
        counts: Tallies for the audit.
        violations: Label of every constraint it violates -> by how much, relative to the bound.
        screen: What it reached in the screening that comes before its evaluation, if there was one.
        out_after: Number of blocks after which it went out of a race, so that it ranks behind all that did not; 0
            if it did not.
    """

    number: int
    candidate: str
    genome: Genome
    asked_after: int
    status: Status
    reason: str = ""
    fitness: float | None = None
    standard_error: float | None = None
    metrics: Metrics = field(default_factory=dict)
    scores: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 1
    counts: Mapping[str, int] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    screen: float | None = None
    out_after: int = 0


@dataclass(frozen=True, kw_only=True)
class Block:
    """The evaluation of a trial on one block of documents, where candidates race, or its screening.

    Unique by `trial` and `block`, its position from 0, or -1 for a screening, which keeps its metrics; the other
    fields mean what they mean in `Trial`.
    """

    trial: int
    block: int
    candidate: str
    status: Status
    reason: str = ""
    metrics: Metrics = field(default_factory=dict)
    scores: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 1
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Final:
    """An evaluation beside the search: the winner, a source model or a baseline.

    Unique by `name` and `stage`: `search` and `holdout` name the documents it was evaluated on, `confirm` is a
    second pass over the search documents. `recipe` is None for a model that was
    not merged; the other fields mean what they mean in `Trial`.
    """

    name: str
    stage: Literal["holdout", "search", "confirm"]
    candidate: str
    recipe: Mapping[str, Any] | None
    status: Status
    reason: str = ""
    metrics: Metrics = field(default_factory=dict)
    scores: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a run started from.

    Attributes:
        experiment: Hash of the resolved experiment.
        settings: The resolved experiment itself, so that a change can be shown.
        inputs: Model or task -> hash of its content.
        versions: Library -> version.
        seed: The searcher's seed.
    """

    experiment: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    versions: Mapping[str, str]
    seed: int
