"""Searches one after the other in one experiment, over weights first and then over layers, with real models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import ConfigurationError, RunStoppedError
from evomerge.journal import Journal
from evomerge.loop import Observer, StopFlag
from evomerge.merge.multi import read_merges
from evomerge.records import Trial
from evomerge.report.status import run_status
from evomerge.report.trials import decode_trial
from evomerge.run import resume_run, start_run
from tests.cli.conftest import Command, command  # noqa: F401 - a fixture
from tests.killed_runs import Silent
from tests.tasks import write_tasks
from tests.test_run import finals, recorded

EXPERIMENT = """\
name: staged
base_model: zoo/base
models: [zoo/one, zoo/two]
stages:
  - name: weights
    search_space:
      type: parameter
      merge_method: task_arithmetic
      parameters: {weight: {low: 0, high: 60, start: 10}}
    search: {algorithm: cma-es, evaluations: 6, seed: 3, population: 6}
  - name: layers
    search_space:
      type: data_flow
      genome: {type: blocks, count: 2}
      scales: {type: hop, low: 0.5, high: 1.5}
      semantics: branch
    search: {algorithm: catcma, evaluations: 8, seed: 3, population: 4}
objectives:
  - {task: choose, metric: acc}
  - {task: gen, metric: exact_match, filter: first, weight: 2}
evaluation: {holdout: 0.4, batch_size: 4, include_path: [tasks]}
workers: {backend: inline}
finish: {baseline_scales: [0.5]}
"""


class StopAfter(Silent):
    """Asks to stop when a number of trials is recorded."""

    def __init__(self, count: int) -> None:
        self.flag = StopFlag()
        self._left = count

    def trial(self, trial: Trial, **_: Any) -> None:
        self._left -= 1
        if not self._left:
            self.flag.set("the test")


def start(
    folder: Path, run_dir: Path, observer: Observer | None = None, stop: StopFlag | None = None
) -> None:
    start_run(folder / "experiment.yml", run_dir, observer=observer or Silent(), stop=stop or StopFlag())


@pytest.fixture(scope="module")
def study(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment, and its run in `whole`."""
    folder = tmp_path_factory.mktemp("staged")
    shutil.copytree(tiny_zoo, folder / "zoo")
    write_tasks(folder / "tasks", count=20)
    (folder / "experiment.yml").write_text(EXPERIMENT)
    start(folder, folder / "whole")
    return folder


def test_the_winner_of_the_first_stage_is_a_model_of_the_second(study: Path) -> None:
    trials = Journal.load(study / "whole" / "journal.jsonl").trials
    assert [trial.number for trial in trials] == list(range(14))
    best_of_first = max(trials[:6], key=lambda trial: (trial.fitness, -trial.number))
    later = decode_trial(study / "whole", 9)
    assert later.stage.name == "layers"
    assert [merge.name for merge in later.merges] == ["weights"]
    merge = later.merges[0].model_copy(update={"name": None})
    assert merge.hash == best_of_first.candidate
    assert "weights" in later.recipe.model_names
    assert len(decode_trial(study / "whole", 2).merges) == 0


def test_the_holdout_compares_the_winner_of_every_stage(study: Path) -> None:
    names = {name for name, stage in finals(study / "whole") if stage == "holdout"}
    assert {"winner", "one", "two", "base", "uniform average"} <= names
    won = decode_trial(study / "whole", None)
    assert ("winner of stage weights" in names) == (won.stage.name == "layers")
    assert run_status(study / "whole")["evaluations"] == {"done": 14, "total": 14}


@pytest.mark.parametrize("count", [3, 6, 7, 11])
def test_a_run_stopped_on_either_side_of_the_seam_continues_the_same(
    study: Path, tmp_path: Path, count: int
) -> None:
    observer = StopAfter(count)
    with pytest.raises(RunStoppedError):
        start(study, tmp_path / "run", observer, observer.flag)
    assert len(recorded(tmp_path / "run")) == count
    resume_run(tmp_path / "run", observer=Silent(), stop=StopFlag())
    assert recorded(tmp_path / "run") == recorded(study / "whole")
    assert finals(tmp_path / "run") == finals(study / "whole")
    ours, theirs = (folder / "best" / "recipe.yml" for folder in (tmp_path / "run", study / "whole"))
    assert ours.read_text() == theirs.read_text()


def test_the_recipe_of_a_trial_can_be_merged_from_its_file_alone(
    study: Path,
    tmp_path: Path,
    command: Command,  # noqa: F811
) -> None:
    won = decode_trial(study / "whole", 13)
    recipe = tmp_path / "recipe.yml"
    for arguments in (
        ["export", study / "whole", recipe, "--trial", "13"],
        ["merge", recipe, tmp_path / "merged"],
        ["export", study / "whole", tmp_path / "exported", "--trial", "13", "--format", "model"],
    ):
        result = command(*arguments)
        assert result.code == 0, result.err
    assert list(read_merges(recipe).named) == ["weights"]
    one, two = (tmp_path / name / "model.safetensors" for name in ("merged", "exported"))
    assert one.read_bytes() == two.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert model.config.num_hidden_layers == len(won.recipe.slices or [])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("name: layers", "name: weights", "names must differ"),
        ("name: layers", "name: zoo/one", "should match pattern"),
        ("stages:", "search: {evaluations: 3}\nstages:", "every stage has its own"),
        ("type: parameter\n", "type: parametre\n", "did you mean 'parameter'?"),
        ("algorithm: catcma", "algorithm: catcmaa", "did you mean 'catcma'?"),
        ("count: 2", "coutn: 2", "stages.1.search_space"),
    ],
)
def test_mistakes_in_a_stage_are_named_at_their_place(
    study: Path, tmp_path: Path, old: str, new: str, reason: str
) -> None:
    text = EXPERIMENT.replace("zoo/", f"{study}/zoo/").replace("[tasks]", f"[{study}/tasks]")
    (tmp_path / "experiment.yml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigurationError) as caught:
        start(tmp_path, tmp_path / "run")
    assert reason in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_layers_can_be_chosen_last_only(study: Path, tmp_path: Path) -> None:
    text = EXPERIMENT.replace("zoo/", f"{study}/zoo/").replace("[tasks]", f"[{study}/tasks]")
    first, second = text.index("  - name: weights"), text.index("  - name: layers")
    end = text.index("objectives:")
    swapped = text[:first] + text[second:end] + text[first:second] + text[end:]
    (tmp_path / "experiment.yml").write_text(swapped)
    with pytest.raises(
        ConfigurationError, match=r"stages\.0\.search_space\.type: only the last stage may choose"
    ):
        start(tmp_path, tmp_path / "run")
