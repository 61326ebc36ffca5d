"""Functions of the user's own run with permission alone, and what is wrong with them is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evomerge.journal import Journal
from tests.cli.conftest import Command
from tests.cli.own import FUNCTIONS, FUNCTIONS_ASKED, SHORT, ask_for, value, write_functions


@pytest.fixture
def functions(experiment: Path) -> Path:
    """An experiment with two functions in a file beside it."""
    ask_for(experiment, FUNCTIONS_ASKED)
    write_functions(experiment.parent)
    return experiment


def test_candidates_race_by_functions(command: Command, functions: Path, tmp_path: Path) -> None:
    functions.write_text(functions.read_text().replace("  batch_size: 8", "  racing: {}"))
    result = command("run", functions, "--allow-code", *SHORT, "--set", "search.evaluations=4")
    assert result.code == 0, result.err
    blocks = Journal.load(tmp_path / "runs/tiny/journal.jsonl").blocks
    assert blocks
    assert {tuple(block.metrics["letters"]) for block in blocks.values()} == {
        ("own_score:letters,evomerge", "own_score:certainty,evomerge")
    }


def test_nothing_of_the_users_runs_without_permission(
    command: Command, functions: Path, tmp_path: Path
) -> None:
    checked = command("validate", functions)
    assert (checked.code, checked.out) == (0, f"{functions}: valid experiment\n")
    assert "needs --allow-code, as it runs own_helper.py, own_score.py" in checked.err
    planned = command("plan", functions)
    assert planned.code == 0, planned.err
    assert "the time that own_score:letters, own_score:certainty takes is not known" in planned.err
    for more in ((), ("--allow-task-code",)):
        refused = command("run", functions, *more)
        assert refused.code == 2
        for place in ("experiment.yml:12: objectives.0.fitness", "experiment.yml:13: objectives.1.fitness"):
            assert f"{place}: {tmp_path}/own_score.py is Python code" in refused.err
        assert "--allow-code" in refused.err
    evaluated = command(
        "evaluate", "x", "--tasks", "letters", "--include-path", "tasks", "--fitness", "own_score:letters"
    )
    assert evaluated.code == 2
    assert "own_score.py is Python code that would be run" in evaluated.err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "imported").exists()


def test_a_function_that_always_fails_stops_the_run_with_its_line(
    command: Command, functions: Path, tmp_path: Path
) -> None:
    text = functions.read_text().replace('"own_score:letters", normalize: sources', '"own_score:fussy"')
    functions.write_text(text)
    result = command("run", functions, "--allow-code")
    assert result.code == 4
    line = FUNCTIONS.splitlines().index('    raise ValueError("too fussy")') + 1
    assert f"own_score:fussy raised ValueError: too fussy (own_score.py:{line})" in result.err
    trials = Journal.load(tmp_path / "runs/tiny/journal.jsonl").trials
    assert {trial.status for trial in trials} == {"invalid"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            '"own_score:letters", n',
            '"own_scor:letters", n',
            ["experiment.yml:12: objectives.0.fitness", "no module"],
        ),
        (
            '"own_score:letters", n',
            '"own_score:leters", n',
            ["objectives.0.fitness", "did you mean 'letters'?"],
        ),
        (
            '"own_score:letters", n',
            '"own_score", n',
            ["objectives.0.fitness", "expected package.module:function"],
        ),
        (", given: model", "", ["own_score:certainty", "expected certainty(documents, generations)"]),
        (
            '"own_score:letters", n',
            '"own_score:letters", metric: x, n',
            ["objectives.0", "one of metric, fitness"],
        ),
        ('"own_score:letters", n', '"own_score:certainty", n', ["objectives", "named twice"]),
        (
            "  holdout: 0.25",
            "  holdout: 0.25\n  code_path: nowhere",
            ["evaluation.code_path", "no such folder"],
        ),
    ],
)
def test_a_fault_is_named_with_its_place(
    command: Command, functions: Path, tmp_path: Path, before: str, after: str, expected: list[str]
) -> None:
    text = functions.read_text()
    assert before in text
    functions.write_text(text.replace(before, after))
    result = command("run", functions, "--allow-code")
    assert result.code in (1, 2)
    for part in expected:
        assert part in result.err
    assert not (tmp_path / "runs").exists()


def test_evaluate_tries_a_function_on_one_model(
    command: Command, functions: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    common = ["evaluate", tiny_zoo / "one", "--tasks", "letters", "--include-path", "tasks", "--json"]
    found = command(*common, "--allow-code", "--fitness", "own_score:letters")
    assert found.code == 0, found.err
    said = [json.loads(line)[1] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == 16
    metrics = json.loads(found.out)["tasks"]["letters"]["metrics"]
    assert metrics["own_score:letters,evomerge"] == pytest.approx(np.mean([value(text) for text in said]))
    assert "exact_match,none" in metrics


def test_a_function_scores_a_task_whose_own_metrics_are_no_means(
    command: Command, functions: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "corpus.yaml").write_text(
        "include: letters.yaml\ntask: corpus\nmetric_list:\n  - {metric: bleu}\n"
    )
    common = ["evaluate", tiny_zoo / "one", "--tasks", "corpus", "--include-path", "tasks", "--json"]
    refused = command(*common)
    assert refused.code == 2
    assert "no metric is the mean of a number per document" in refused.err
    found = command(*common, "--allow-code", "--fitness", "own_score:letters")
    assert found.code == 0, found.err
    assert list(json.loads(found.out)["tasks"]["corpus"]["metrics"]) == ["own_score:letters,evomerge"]


def test_a_file_that_is_no_module_is_no_function(command: Command, functions: Path, tmp_path: Path) -> None:
    (tmp_path / "my-score.py").write_text(FUNCTIONS)
    refused = command("evaluate", "x", "--tasks", "letters", "--fitness", "my-score:letters", "--allow-code")
    assert refused.code == 2
    assert "--fitness my-score:letters: expected module:function" in refused.err
