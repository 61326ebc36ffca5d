"""The trials of a run among which only the user's taste decides, where there are several objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.fitness.objectives import Objective
from evomerge.fitness.ranking import pareto_front
from evomerge.records import Trial


def front_rows(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    """The trials that no other one equals or beats in every objective, as plain values, by falling fitness.

    Returns:
        Per trial `trial`, `candidate`, `fitness`, and `metrics`: label of every objective -> value.
    """
    return [
        {
            "trial": trial.number,
            "candidate": trial.candidate,
            "fitness": trial.fitness,
            "metrics": {item.label: item.of(trial.metrics) for item in objectives},
        }
        for trial in pareto_front(trials, objectives)
    ]
