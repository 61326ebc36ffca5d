"""The front of a run as plain values."""

from __future__ import annotations

from evomerge.fitness.objectives import Objective
from evomerge.records import Status, Trial
from evomerge.report.front import front_rows


def test_the_front_names_trials_with_their_objectives() -> None:
    objectives = [
        Objective(task=task, metric="acc", filter="none", weight=1, maximize=True) for task in ("a", "b")
    ]
    trials = [
        Trial(
            number=number,
            candidate=f"c{number}",
            genome=(),
            asked_after=0,
            status=Status.OK,
            fitness=(a + b) / 2,
            metrics={"a": {"acc,none": a, "other,none": 9.0}, "b": {"acc,none": b}},
        )
        for number, (a, b) in enumerate([(0.5, 0.5), (0.25, 1.0), (0.25, 0.75)])
    ]
    assert front_rows(trials, objectives) == [
        {"trial": 1, "candidate": "c1", "fitness": 0.625, "metrics": {"a acc": 0.25, "b acc": 1.0}},
        {"trial": 0, "candidate": "c0", "fitness": 0.5, "metrics": {"a acc": 0.5, "b acc": 0.5}},
    ]
