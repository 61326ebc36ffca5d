"""From metrics to fitness, and the statistics of a comparison between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from evomerge.measure_settings import OwnSettings
from evomerge.records import Metrics, SampleScores

BUILT_IN = "evomerge"
"""Stands for the filter of the metrics that evomerge adds to tasks; see `fitness.metrics`."""

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that a model reaches on a task.

    Attributes:
        task: The task as the experiment names it.
        metric: Name of the metric.
        filter: The task's filter that the metric is read from.
        maximize: Whether larger is better.
        own: The function or judge of the user's that it comes from, if it does; see `fitness.own`.
    """

    task: str
    metric: str
    filter: str
    maximize: bool
    own: OwnSettings | None = None

    @property
    def key(self) -> str:
        """Name of the metric in outcomes: lm-eval's `metric,filter`."""
        return f"{self.metric},{self.filter}"

    @property
    def label(self) -> str:
        """Name for tables; the filter only where it says something."""
        return f"{self.task} {self.metric if self.filter in ('none', BUILT_IN) else self.key}"

    def of(self, metrics: Metrics) -> float:
        """The number among all that a model reached."""
        return metrics[self.task][self.key]

    def best_of(self, models: Sequence[Metrics]) -> float:
        """The best that any of several models reached."""
        return (max if self.maximize else min)(self.of(metrics) for metrics in models)


@dataclass(frozen=True, kw_only=True)
class Objective(Measure):
    """One number to optimise, with everything that was left open in the experiment filled in.

    Attributes:
        weight: Share in the fitness.
        normalize: Whether it counts relative to what the best source model reaches.
        reference: What the best source model reaches; needed, and known, only where `normalize` is set.
    """

    weight: float
    normalize: bool = False
    reference: float | None = None

    def value(self, score: Number) -> Number:
        """What scores count for: larger is better.

        With a reference r it is the share of r that is reached, 1 + (score - r) / |r| where larger scores are
        better: 1 for a model as good as the best source. Where scores are positive that is score / r; the form
        holds for scores below 0 and for scores to be minimised as well.
        """
        sign = 1 if self.maximize else -1
        if not self.normalize:
            return sign * score
        assert self.reference is not None, f"{self.label}: the source models have not been scored"
        return 1 + sign * (score - self.reference) / abs(self.reference)


def fitness(metrics: Metrics, objectives: Sequence[Objective]) -> float:
    """Weighted mean of the objectives' values; scores to be minimised count negatively."""
    total = sum(objective.weight for objective in objectives)
    return math.fsum(item.weight * item.value(item.of(metrics)) for item in objectives) / total


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over documents with its standard error, which a single document leaves unknown: None."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Comparison of two models on the same documents.

    Attributes:
        difference: Fitness of the first minus fitness of the second.
        standard_error: Its standard error; None where a single document leaves it unknown.
        low: Lower end of the 95 % confidence interval, or None.
        high: Upper end, or None.
        p_value: Two-sided p of a sign-flip permutation test.
    """

    difference: float
    standard_error: float | None
    low: float | None
    high: float | None
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the difference is unlikely to be chance at the 5 % level."""
        return self.p_value < 0.05


NUM_PERMUTATIONS = 20_000


def estimate(samples: Mapping[str, SampleScores], objectives: Sequence[Objective]) -> Estimate:
    """The fitness as a mean of per-document scores, with its standard error.

    The fitness is a sum over documents, so its variance is the sum of the tasks' variances; the metrics of a
    task are not independent and are added up per document first. Documents are the only source of error
    counted.
    """
    shares = _shares(samples, objectives)
    return Estimate(
        mean=math.fsum(float(part.sum()) for part in shares.values()), standard_error=_standard_error(shares)
    )


def paired_test(
    first: Mapping[str, SampleScores],
    second: Mapping[str, SampleScores],
    objectives: Sequence[Objective],
    *,
    seed: int = 0,
) -> PairedTest:
    """Compare two models on the same documents.

    Under the null hypothesis the two scores of a document may be swapped, so the distribution of the
    difference is that of the document-wise differences with random signs. A document that serves several
    objectives of its task is flipped as one.

    Args:
        first: Per-document scores of the first model.
        second: Per-document scores of the second model.
        objectives: What the fitness is made of.
        seed: Seed of the random signs.

    Raises:
        ValueError: The two were scored on different documents.
    """
    for objective in objectives:
        if first[objective.task].doc_ids != second[objective.task].doc_ids:
            raise ValueError(f"{objective.task}: scored on different documents")
    of_second = _shares(second, objectives)
    by_task = {task: part - of_second[task] for task, part in _shares(first, objectives).items()}
    shares = np.concatenate(list(by_task.values()))
    difference = float(shares.sum())
    error = _standard_error(by_task)
    margin = None if error is None else 1.96 * error
    generator = np.random.default_rng(seed)
    moving = np.abs(shares[shares != 0])
    # Sums that are equal but for the rounding of float64 count as equal.
    threshold = abs(difference) - 1e-12 * float(moving.sum())
    extreme = 0
    for first_row in range(0, NUM_PERMUTATIONS, 1000):
        rows = min(1000, NUM_PERMUTATIONS - first_row)
        signs = generator.integers(0, 2, size=(rows, len(moving))) * 2 - 1
        extreme += int((np.abs(signs @ moving) >= threshold).sum())
    return PairedTest(
        difference=difference,
        standard_error=error,
        low=None if margin is None else difference - margin,
        high=None if margin is None else difference + margin,
        p_value=(extreme + 1) / (NUM_PERMUTATIONS + 1),
    )


def column_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of one metric's scores, documents being the only source of error counted.

    A single document leaves it unknown.
    """
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def document_shares(
    samples: Mapping[str, SampleScores], objectives: Sequence[Objective]
) -> dict[str, np.ndarray]:
    """Task -> a number per document; the sum over tasks of their means is the fitness."""
    return {task: part * len(part) for task, part in _shares(samples, objectives).items()}


def _shares(samples: Mapping[str, SampleScores], objectives: Sequence[Objective]) -> dict[str, np.ndarray]:
    """Task -> what each of its documents adds to the fitness, which is the sum of all."""
    total = sum(objective.weight for objective in objectives)
    shares: dict[str, np.ndarray] = {}
    for objective in objectives:
        scores = np.asarray(samples[objective.task].values[objective.key], dtype=np.float64)
        share = objective.weight / total * objective.value(scores) / len(scores)
        shares[objective.task] = shares.get(objective.task, 0.0) + share
    return shares


def _standard_error(shares: Mapping[str, np.ndarray]) -> float | None:
    """Standard error of the sum of all shares, with the documents of each task as a sample of their own.

    A single document of a task leaves it unknown.
    """
    if any(len(part) < 2 for part in shares.values()):
        return None
    return math.sqrt(sum(len(part) * float(part.var(ddof=1)) for part in shares.values()))
