"""The trials of a run among which only the user's taste decides, where there are several objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.fitness.objectives import Objective, column_error
from evomerge.fitness.ranking import pareto_front
from evomerge.records import Trial
from evomerge.run_dir import RunDir


def front_rows(
    run_dir: RunDir, trials: Sequence[Trial], objectives: Sequence[Objective]
) -> list[dict[str, Any]]:
    """The trials that no other one equals or beats in every objective, as plain values, by falling fitness.

    Returns:
        Per trial `trial`, `candidate`, `fitness` with its `standard_error`, and `metrics` with their
        `standard_errors`: label of every objective -> value.
    """
    return [
        {
            "trial": trial.number,
            "candidate": trial.candidate,
            "fitness": trial.fitness,
            "standard_error": trial.standard_error,
            "metrics": {item.label: item.of(trial.metrics) for item in objectives},
            "standard_errors": _errors(run_dir, trial, objectives),
        }
        for trial in pareto_front(trials, objectives)
    ]


def _errors(run_dir: RunDir, trial: Trial, objectives: Sequence[Objective]) -> dict[str, float | None]:
    samples = run_dir.read_scores(trial.scores) if trial.scores else {}
    return {
        item.label: column_error(samples[item.task].values[item.key]) if item.task in samples else None
        for item in objectives
    }
