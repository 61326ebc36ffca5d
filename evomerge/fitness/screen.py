"""Screening: a cheap look at all candidates of a generation, so that only the better part is scored in full.

The cheap look is the likelihood of the tasks' reference answers, which needs no generation. The part that is left
out ranks behind the others, by that likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.metrics import LIKELIHOOD
from evomerge.fitness.objectives import Objective
from evomerge.records import Metrics


def screening_documents(
    documents: Sequence[DocumentSet], objectives: Sequence[Objective]
) -> tuple[DocumentSet, ...]:
    """The documents of the objectives' tasks, to be scored by likelihood alone."""
    tasks = {item.task for item in objectives}
    return tuple(replace(subset, metrics=(LIKELIHOOD,)) for subset in documents if subset.name in tasks)


def screening_score(metrics: Metrics, objectives: Sequence[Objective]) -> float:
    """The likelihood of the answers, averaged over the objectives' tasks with the weights of the objectives."""
    key = ",".join(LIKELIHOOD)
    total = sum(item.weight for item in objectives)
    return math.fsum(item.weight * metrics[item.task][key] for item in objectives) / total


def passing(scores: Mapping[int, float], keep: float) -> list[int]:
    """The candidates that go on, by number: the best share of them, at least one; of equals the earlier ones.

    Args:
        scores: Number of the trial -> its score in the screening.
        keep: Share to keep, rounded up.
    """
    count = max(1, math.ceil(keep * len(scores) - 1e-9))
    return sorted(sorted(scores, key=lambda number: (-scores[number], number))[:count])
