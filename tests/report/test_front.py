"""The front of a run as plain values."""

from __future__ import annotations

from pathlib import Path

from evomerge.fitness.objectives import Objective
from evomerge.records import SampleScores, Status, Trial
from evomerge.report.front import front_rows
from evomerge.run_dir import RunDir


def test_the_front_names_trials_with_their_objectives_and_errors(tmp_path: Path) -> None:
    objectives = [
        Objective(task=task, metric="acc", filter="none", weight=1, maximize=True) for task in ("a", "b")
    ]
    run_dir = RunDir(tmp_path)
    run_dir.create()
    # Of the four documents of each task the first scores 1, the others 0.
    column = (1.0, 0.0, 0.0, 0.0)
    samples = {task: SampleScores(doc_ids=(0, 1, 2, 3), values={"acc,none": column}) for task in ("a", "b")}
    trials = [
        Trial(
            number=number,
            candidate=f"c{number}",
            genome=(),
            asked_after=0,
            status=Status.OK,
            fitness=(a + b) / 2,
            standard_error=0.125,
            scores=run_dir.write_scores("1-search", samples) if number == 1 else "",
            metrics={"a": {"acc,none": a, "other,none": 9.0}, "b": {"acc,none": b}},
        )
        for number, (a, b) in enumerate([(0.5, 0.5), (0.25, 1.0), (0.25, 0.75)])
    ]
    assert front_rows(run_dir, trials, objectives) == [
        {
            "trial": 1,
            "candidate": "c1",
            "fitness": 0.625,
            "standard_error": 0.125,
            "metrics": {"a acc": 0.25, "b acc": 1.0},
            "standard_errors": {"a acc": 0.25, "b acc": 0.25},
        },
        {
            "trial": 0,
            "candidate": "c0",
            "fitness": 0.5,
            "standard_error": 0.125,
            "metrics": {"a acc": 0.5, "b acc": 0.5},
            "standard_errors": {"a acc": None, "b acc": None},
        },
    ]
