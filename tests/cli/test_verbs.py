"""Every verb on a small real run: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Result


@pytest.fixture
def finished(command: Command, experiment: Path) -> Result:
    """The result of a finished run in `runs/tiny`."""
    result = command("run", experiment)
    assert result.code == 0, result.err
    return result


def test_run_prints_the_result_on_stdout_and_news_on_stderr(finished: Result, tmp_path: Path) -> None:
    assert "best recipe     runs/tiny/best/recipe.yml" in finished.out
    for name in ("winner", "base", "one", "two", "uniform average", "task arithmetic 0.5"):
        assert name in finished.out
    assert "lm_eval run --model hf" in finished.out
    assert '--samples \'{"letters":[' in finished.out
    assert "generation" in finished.err
    number = r"-?\d\.\d{4} ± \d\.\d{4}"
    assert re.search(rf"best fitness    {number} on the search documents, the best of many", finished.out)
    assert re.search(rf"^winner +{number} +{number}$", finished.out, re.MULTILINE)
    assert re.search(rf"generation 1 .* fitness: best {number}   median {number}", finished.err)
    assert "on the search documents, best of 6: optimistic" in finished.out
    assert "candidates: 6 scored" in finished.out
    comment = (tmp_path / "runs/tiny/best/recipe.yml").read_text().splitlines()[0]
    assert re.fullmatch(
        rf"# trial \d, fitness {number} on the search documents, chosen by it: optimistic", comment
    )
    assert (tmp_path / "runs/tiny/best/recipe.yml").is_file()
    assert not (tmp_path / "runs/tiny/best/model").exists()


def test_run_refuses_a_folder_with_a_run_and_names_resume(
    command: Command, experiment: Path, finished: Result
) -> None:
    again = command("run", experiment)
    assert again.code == 3
    assert "evomerge resume runs/tiny" in again.err


def test_run_refuses_a_folder_with_other_files(command: Command, experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    result = command("run", experiment, "--run-dir", "full")
    assert result.code == 3
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_set_changes_the_experiment(command: Command, experiment: Path, tmp_path: Path) -> None:
    result = command("run", experiment, "--run-dir", "other", "--set", "search.evaluations=2")
    assert result.code == 0
    status = json.loads(command("status", "other", "--json").out)
    assert status["evaluations"] == {"done": 2, "total": 2}


def test_status_tells_a_finished_run(command: Command, finished: Result) -> None:
    shown = command("status", "runs/tiny")
    assert shown.code == 0
    assert "finished" in shown.out
    # All of the result but where it lies and how to check it.
    assert finished.out.partition("\n\n")[2].partition("To check the winner")[0].strip() in shown.out
    status = json.loads(command("status", "runs/tiny", "--json").out)
    assert status["state"] == "finished"
    assert status["evaluations"] == {"done": 6, "total": 6}
    assert {row["name"] for row in status["holdout"]["rows"]} >= {"winner", "uniform average"}
    assert status["audit"]["candidates"] == {"ok": 6}
    assert status["audit"]["models"]["winner"]["empty"]["of"] == 4
    assert status["audit"]["models"]["winner"]["no_answer"] is None
    assert [each["on"] for each in status["audit"]["winner"]] == ["search", "confirm", "holdout"]
    reached = status["audit"]["winner"][0]["fitness"]
    assert reached == {key: status["best"][at] for key, at in (("mean", "fitness"), ("standard_error",) * 2)}
    written = json.loads(Path("runs/tiny/status.json").read_text())
    assert written["audit"] == status["audit"]


def test_an_exported_recipe_merges_to_the_exported_model(
    command: Command, finished: Result, tmp_path: Path
) -> None:
    from evomerge import Checkpoint

    assert command("export", "runs/tiny", "best.yml").code == 0
    assert command("export", "runs/tiny", "best-model", "--format", "model").code == 0
    assert command("merge", "best.yml", "merged").code == 0
    exported, merged = (Checkpoint.open(tmp_path / name) for name in ("best-model", "merged"))
    assert list(exported.tensors) == list(merged.tensors)
    for name in exported.tensors:
        assert exported.tensor(name).equal(merged.tensor(name))
    assert (tmp_path / "best-model" / "tokenizer.json").is_file()


def test_export_takes_any_trial_and_overwrites_nothing(
    command: Command, finished: Result, tmp_path: Path
) -> None:
    assert command("export", "runs/tiny", "third.yml", "--trial", "3").code == 0
    assert command("export", "runs/tiny", "third.yml", "--trial", "3").code == 3
    missing = command("export", "runs/tiny", "x.yml", "--trial", "99")
    assert missing.code == 2
    assert "no trial 99" in missing.err


def test_merge_refuses_a_folder_that_is_not_empty(command: Command, finished: Result, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("x")
    result = command("merge", "runs/tiny/best/recipe.yml", "out")
    assert result.code == 3
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["keep.txt"]


def test_evaluate_scores_a_checkpoint_and_a_recipe_alike(command: Command, finished: Result) -> None:
    options = ["--tasks", "letters", "--include-path", "tasks", "--batch-size", 8, "--json"]
    assert command("merge", "runs/tiny/best/recipe.yml", "merged").code == 0
    checkpoint = command("evaluate", "merged", *options)
    recipe = command("evaluate", "runs/tiny/best/recipe.yml", *options)
    assert checkpoint.code == recipe.code == 0
    found = json.loads(checkpoint.out)["tasks"]
    assert found == json.loads(recipe.out)["tasks"]
    assert found["letters"]["num_documents"] == 16
    shown = command("evaluate", "merged", *options[:-1]).out
    assert re.search(r"letters +exact_match,none +\d\.\d{4} ± \d\.\d{4}   16 documents", shown)
    assert re.search(r"^merged +\d+ of 16, .* %$", shown, re.MULTILINE)
    alone = command("evaluate", "merged", *options, "--limit", 1)
    assert json.loads(alone.out)["tasks"]["letters"]["standard_errors"] == {"exact_match,none": None}


def test_validate_knows_every_kind_of_file(command: Command, experiment: Path, finished: Result) -> None:
    result = command("validate", experiment, "runs/tiny/best/recipe.yml", "runs/tiny/experiment.yml")
    assert result.code == 0
    assert result.out.splitlines()[0].endswith("valid experiment")
    assert result.out.splitlines()[1].endswith("valid recipe")


@pytest.mark.parametrize(
    ("verb", "name"), [("methods", "dare_ties"), ("spaces", "parameter"), ("searchers", "cma-es")]
)
def test_lists_read_the_tables(command: Command, verb: str, name: str) -> None:
    assert f"{name}:" in command(verb).out
    assert name in {entry["name"] for entry in json.loads(command(verb, "--json").out)}


def test_resume_of_a_finished_run_shows_its_result_again(command: Command, finished: Result) -> None:
    again = command("resume", "runs/tiny")
    assert again.code == 0
    assert again.out == finished.out


def test_help_and_the_package_itself_load_neither_torch_nor_ray() -> None:
    script = (
        "import sys, click.testing, evomerge\n"
        "from evomerge.cli import evomerge as group\n"
        "result = click.testing.CliRunner().invoke(group, ['--help'])\n"
        "assert result.exit_code == 0 and 'resume' in result.output\n"
        "heavy = {'torch', 'ray', 'transformers', 'lm_eval', 'numpy', 'cma', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
