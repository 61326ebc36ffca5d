"""Racing: which candidates of a generation need no more documents.

Candidates are scored in blocks of documents, all on the same ones. After a block the fitness that each would
reach on all documents is known up to chance: its remaining documents are a sample of the same kind as those it
was scored on. From this follows how likely it is among the best `wanted` of its generation, which is what an
evolution strategy selects by, and how likely it is the very best, which is what the run is after:

- a candidate that is too unlikely among the best is *out*;
- a candidate that is surely among the best and surely not the best is *settled*: where exactly it ranks among
  the chosen matters little.

All others go on to the next block. The error rate is spent over the looks: the chance of a candidate to be
among the best is bounded by it at the moment it goes out.

The chances are computed, not bounded: scores of all candidates on the documents so far, their covariances
included, as candidates fail on the same documents, and the correction for drawing documents from a finite set
without putting them back. The idea of racing is from Maron and Moore, "Hoeffding Races: Accelerating Model
Selection Search for Classification and Function Approximation", 1993; the use of it within evolution
strategies from Heidrich-Meisner and Igel, "Hoeffding and Bernstein Races for Selecting Policies in
Evolutionary Direct Policy Search", 2009, https://doi.org/10.1145/1553374.1553426. Their bounds hold for any
distribution, but are so wide that they stop hardly any candidate before a few hundred documents.

Legend: C candidates, D documents scored so far, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 4000
"""Draws from which chances are counted; an error rate of 0.1 is then met within 0.01."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of the candidates on one task.

    Attributes:
        scores_CD: What each document adds to a candidate's fitness when it counts for one document, that is
            weight times score; larger is better.
        total: Number of documents of the task in all.
    """

    scores_CD: Scores
    total: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a candidate stands after a block.

    Attributes:
        mean: Its fitness on the documents so far.
        among_best: Chance to be among the best `wanted`.
        best: Chance to be the best of all.
    """

    mean: float
    among_best: float
    best: float


def standings(tasks: Sequence[Seen], wanted: int, *, seed: int) -> list[Standing]:
    """How every candidate that is still racing stands.

    Args:
        tasks: What is known per task, the same candidates in each.
        wanted: How many of them will be chosen.
        seed: Seed of the draws.
    """
    means_C, covariance_CC = _posterior(tasks)
    num = len(means_C)
    generator = np.random.default_rng(seed)
    # The root by eigenvalues also serves covariances that are not definite: candidates that are alike.
    values, vectors = np.linalg.eigh(covariance_CC)
    root_CC = vectors * np.sqrt(np.clip(values, 0.0, None))
    # The covariance is itself estimated, from as many documents; hence Student's t instead of the normal.
    freedom = min(task.scores_CD.shape[1] for task in tasks)
    tails_S = np.sqrt(freedom / generator.chisquare(freedom, NUM_DRAWS))
    drawn_SC = means_C + (generator.standard_normal((NUM_DRAWS, num)) @ root_CC.T) * tails_S[:, None]
    order_SC = np.argsort(-drawn_SC, axis=1, kind="stable")
    chosen = np.bincount(order_SC[:, :wanted].ravel(), minlength=num) / NUM_DRAWS
    best = np.bincount(order_SC[:, 0], minlength=num) / NUM_DRAWS
    return [
        Standing(mean=float(m), among_best=float(c), best=float(b))
        for m, c, b in zip(means_C, chosen, best, strict=True)
    ]


def _posterior(tasks: Sequence[Seen]) -> tuple[Scores, Scores]:
    """Mean and covariance of the fitness on all documents, given those seen."""
    parts = [_task_posterior(task) for task in tasks]
    return sum((mean for mean, _ in parts), np.zeros(1)), sum((cov for _, cov in parts), np.zeros((1, 1)))


def _task_posterior(task: Seen) -> tuple[Scores, Scores]:
    """What a task adds to it: the documents seen, and a prediction for the others."""
    scores_CD, (num, count) = task.scores_CD, task.scores_CD.shape
    mean_C = scores_CD.mean(axis=1)
    rest = task.total - count
    if not rest:
        return mean_C, np.zeros((num, num))
    centred_CD = scores_CD - mean_C[:, None]
    spread = float(np.ptp(scores_CD)) or 1.0
    # One more document, on which candidates differ by chance as much as scores do: a few documents that agree
    # by luck must not pass for certainty.
    within_CC = (centred_CD @ centred_CD.T + np.eye(num) * spread**2 / 2) / (count + 1)
    noise_CC = within_CC / count
    # Candidates differ less than their means on few documents do. What noise does not explain of the variance
    # of the means is that of the candidates themselves, and the means shrink towards their own mean by it
    # (empirical Bayes).
    common = float(mean_C.mean())
    noise = float(np.trace(noise_CC) - noise_CC.sum() / num) / max(1, num - 1)
    between = max(0.0, float(mean_C.var(ddof=1)) - noise) if num > 1 else 0.0
    prior_CC = np.eye(num) * max(between, 1e-12 * spread**2)
    gain_CC = np.linalg.solve(prior_CC + noise_CC, prior_CC).T
    ability_C = common + gain_CC @ (mean_C - common)
    ability_CC = prior_CC - gain_CC @ prior_CC
    share = rest / task.total
    return (1 - share) * mean_C + share * ability_C, share**2 * (ability_CC + within_CC / rest)
