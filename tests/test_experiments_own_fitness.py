"""The example of own fitness is valid, runs, and its functions are what its page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.fitness.user_code import load_function, survey
from evomerge.loop import StopFlag
from evomerge.report.validate import validate_file
from evomerge.run import start_run
from tests.killed_runs import Silent

FOLDER = Path(__file__).parents[1] / "experiments" / "own_fitness"
FILE = FOLDER / "experiment.yml"


def test_the_experiment_is_valid_and_opens_with_its_command() -> None:
    warning = "a run of this needs --allow-code, as it runs my_fitness.py"
    assert validate_file(FILE) == ("experiment", [warning])
    assert FILE.read_text().startswith("# evomerge run experiments/own_fitness/experiment.yml --allow-code\n")


def test_letters_count_where_they_stand() -> None:
    letters_right = load_function("my_fitness:letters_right", survey(["my_fitness:letters_right"], FOLDER))
    documents = [{"answer": "一六五"}] * 5
    said = ["一六五", "一六", "五六一", "一六五五", ""]
    assert letters_right(documents, said) == pytest.approx([1, 2 / 3, 1 / 3, 3 / 4, 0])


def test_it_runs(tmp_path: Path) -> None:
    overrides = (
        "search.evaluations=2",
        "evaluation.limit=8",
        "workers={backend: inline}",
        "finish.confirm=0",
    )
    result = start_run(
        FILE,
        tmp_path / "run",
        overrides=[*overrides, "finish.baseline_scales=[]"],
        allow_code=True,
        observer=Silent(),
        stop=StopFlag(),
    )
    assert result.holdout is not None
    rows = {row.name: row.metrics for row in result.holdout.rows}
    for task in ("kana_sum", "kana_mirror"):
        label = f"{task} my_fitness:letters_right"
        assert rows["kana"][label] > rows["maths"][label] + 0.2
    assert result.commands == ()
