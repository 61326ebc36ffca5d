"""`evomerge plan`: what it prints, and that it fails as `validate` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.plan import machine
from tests.cli.conftest import Command
from tests.cli.test_bad_input import BAD_EXPERIMENTS


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROUND_SECONDS", 0.001)


def test_an_experiment_is_told_on_stdout_and_warnings_on_stderr(command: Command, experiment: Path) -> None:
    result = command("plan", experiment)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("tiny         6 candidates in ")
    labels = [line[:13].strip() for line in lines if line[:1].strip()]
    assert labels[1:] == [
        "models",
        "search",
        "tasks",
        "candidate",
        "evaluations",
        "workers",
        "memory",
        "disk",
        "time",
    ]
    assert result.err == (
        "warning: search.evaluations: the last generation has 2 of its 4 candidates; 4 or 8 fit\n"
    )
    assert not Path("runs").exists()


def test_json_is_plain_values_alone(command: Command, experiment: Path) -> None:
    found = json.loads(command("plan", experiment, "--json").out)
    assert found["kind"] == "experiment"
    assert found["stages"][0]["dimensions"] == {"continuous": 2, "integer": 0, "categorical": 0}
    assert len(found["warnings"]) == 1


def test_set_changes_the_experiment(command: Command, experiment: Path) -> None:
    result = command("plan", experiment, "--set", "search.evaluations=8", "--json")
    assert json.loads(result.out)["evaluations"]["search"] == 8
    assert result.err == ""


def test_a_recipe_is_told(command: Command, tiny_zoo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n"
        f"  - {{model: {tiny_zoo}/one, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {tiny_zoo}/two, parameters: {{weight: 1}}}}\n"
    )
    result = command("plan", recipe)
    assert result.code == 0, result.err
    assert result.out.startswith("linear       ")
    assert "reads" in result.out
    assert json.loads(command("plan", recipe, "--json").out)["kind"] == "recipe"


@pytest.mark.parametrize(
    "kind", ["a missing model", "a metric that the task does not have", "a misspelt required key"]
)
def test_faults_are_those_of_validate(kind: str, command: Command, experiment: Path, tiny_zoo: Path) -> None:
    old, new, words = BAD_EXPERIMENTS[kind]
    text = experiment.read_text()
    old, new = (part.format(zoo=tiny_zoo) for part in (old, new))
    assert old in text
    experiment.write_text(text.replace(old, new))
    validated, planned = command("validate", experiment), command("plan", experiment)
    assert planned.code == validated.code == 2
    assert planned.err == f"error: {validated.err}"
    assert all(word in planned.err for word in words)
    assert planned.out == ""


def test_a_file_of_another_kind_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("a: 1\n")
    validated, planned = command("validate", "x.yml"), command("plan", "x.yml")
    assert planned.code == 2
    assert planned.err == f"error: {validated.err}"
