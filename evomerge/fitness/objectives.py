"""From metrics to fitness, and the statistics of a comparison between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.records import Metrics, SampleScores


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One number to optimise, with everything that was left open in the experiment filled in.

    Attributes:
        task: The task as the experiment names it.
        metric: Name of the metric.
        filter: The task's filter that the metric is read from.
        weight: Share in the fitness.
        maximize: Whether larger is better.
    """

    task: str
    metric: str
    filter: str
    weight: float
    maximize: bool

    @property
    def key(self) -> str:
        """Name of the metric in outcomes: lm-eval's `metric,filter`."""
        return f"{self.metric},{self.filter}"

    @property
    def label(self) -> str:
        """Name for tables; the filter only where it says something."""
        return f"{self.task} {self.metric if self.filter == 'none' else self.key}"


def fitness(metrics: Metrics, objectives: Sequence[Objective]) -> float:
    """Weighted mean of the objectives; those to be minimised count negatively."""
    total = sum(objective.weight for objective in objectives)
    return (
        math.fsum(
            (1 if objective.maximize else -1) * objective.weight * metrics[objective.task][objective.key]
            for objective in objectives
        )
        / total
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over documents with its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Comparison of two models on the same documents.

    Attributes:
        difference: Fitness of the first minus fitness of the second.
        standard_error: Its standard error.
        low: Lower end of the 95 % confidence interval.
        high: Upper end.
        p_value: Two-sided p of a sign-flip permutation test.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the difference is unlikely to be chance at the 5 % level."""
        return self.p_value < 0.05


NUM_PERMUTATIONS = 20_000


def estimate(samples: Mapping[str, SampleScores], objectives: Sequence[Objective]) -> Estimate:
    """The fitness as a mean of per-document scores, with its standard error.

    The fitness is a weighted sum of task means, so its variance is the weighted sum of their variances;
    documents are the only source of error counted.
    """
    mean = variance = 0.0
    for weight, scores in _weighted(samples, objectives):
        mean += weight * float(scores.mean())
        if len(scores) > 1:
            variance += weight**2 * float(scores.var(ddof=1)) / len(scores)
    return Estimate(mean=mean, standard_error=math.sqrt(variance))


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
    by_task: dict[str, np.ndarray] = {}
    for objective, (weight, a), (_, b) in zip(
        objectives, _weighted(first, objectives), _weighted(second, objectives), strict=True
    ):
        if first[objective.task].doc_ids != second[objective.task].doc_ids:
            raise ValueError(f"{objective.task}: scored on different documents")
        share = weight * (a - b) / len(a)
        by_task[objective.task] = by_task.get(objective.task, 0.0) + share
    shares = np.concatenate(list(by_task.values()))
    difference = float(shares.sum())
    variance = sum(len(part) * float(part.var(ddof=1)) for part in by_task.values() if len(part) > 1)
    error = math.sqrt(variance)
    generator = np.random.default_rng(seed)
    moving = np.abs(shares[shares != 0])
    extreme = 0
    for first_row in range(0, NUM_PERMUTATIONS, 1000):
        rows = min(1000, NUM_PERMUTATIONS - first_row)
        signs = generator.integers(0, 2, size=(rows, len(moving))) * 2 - 1
        extreme += int((np.abs(signs @ moving) >= abs(difference) - 1e-12).sum())
    return PairedTest(
        difference=difference,
        standard_error=error,
        low=difference - 1.96 * error,
        high=difference + 1.96 * error,
        p_value=(extreme + 1) / (NUM_PERMUTATIONS + 1),
    )


def _weighted(
    samples: Mapping[str, SampleScores], objectives: Sequence[Objective]
) -> list[tuple[float, np.ndarray]]:
    """Per objective its signed share of the fitness and its per-document scores."""
    total = sum(objective.weight for objective in objectives)
    return [
        (
            (1 if objective.maximize else -1) * objective.weight / total,
            np.asarray(samples[objective.task].values[objective.key], dtype=np.float64),
        )
        for objective in objectives
    ]
