"""The end of a run compares the winner's checkpoint with the obvious rivals, and survives their failures."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge import finish, run
from evomerge.errors import EvomergeError, RunExistsError, WorkerError
from evomerge.experiment import FinishSettings
from evomerge.journal import Journal
from evomerge.loop import StopFlag
from evomerge.records import Outcome, Status
from evomerge.rivals import model_labels, single_scale, uniform_average
from evomerge.run import RunResult
from evomerge.run_dir import RunDir
from evomerge.workers.base import Job
from tests.killed_runs import ShufflingPool, Silent, fake_export, prepared, score

Decide = Callable[[Job], Outcome]


class Controller:
    """Starts and resumes runs over a fake pool in one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "run"
        self.ready = prepared(folder, 8)
        self.decide: Decide = score
        self.evaluated: list[str] = []
        monkeypatch.setattr(run, "prepare", lambda *_, **__: self.ready)
        monkeypatch.setattr(run, "_start_pool", lambda *_: _Pool(self))
        monkeypatch.setattr(finish, "export_model", fake_export)

    def settings(self, **changes: Any) -> None:
        experiment = self.ready.experiment
        self.ready.experiment = experiment.model_copy(update={"finish": FinishSettings(**changes)})

    def start(self) -> RunResult:
        return run.start_run(self.folder, self.folder, observer=Silent(), stop=StopFlag())

    def resume(self) -> RunResult:
        return run.resume_run(self.folder, observer=Silent(), stop=StopFlag())

    def finals(self) -> dict[tuple[str, str], Any]:
        journal = Journal.load(self.folder / "journal.jsonl")
        return {(final.name, final.stage): final for final in journal.finals}

    def state(self) -> str:
        return str(json.loads((self.folder / "status.json").read_text())["state"])


class _Pool(ShufflingPool):
    def __init__(self, controller: Controller) -> None:
        super().__init__(controller.folder.parent / "log", 0)
        self._controller = controller

    def next(self, timeout: float) -> tuple[int, Outcome] | None:
        job = self._jobs.pop()
        self._controller.evaluated.append(job.checkpoint.name if job.checkpoint else "recipe")
        return job.number, self._controller.decide(job)


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    return Controller(tmp_path, monkeypatch)


def failing(*names: str) -> Decide:
    """Checkpoints of these names fail."""

    def decide(job: Job) -> Outcome:
        if job.checkpoint is not None and job.checkpoint.name in names:
            return Outcome(status=Status.FAILED, reason="no memory left")
        return score(job)

    return decide


def test_the_winner_meets_the_sources_the_average_and_the_best_scale(controller: Controller) -> None:
    result = controller.start()
    finals = controller.finals()
    on_search = {name for name, stage in finals if stage == "search"}
    held_out = {name for name, stage in finals if stage == "holdout"}
    assert on_search == {"task arithmetic 0.5", "task arithmetic 1"}
    # 0.5 is nearer to the top of the bowl than 1.
    assert held_out == {
        "winner",
        "base",
        "one",
        "two",
        "three",
        "uniform average",
        "task arithmetic 0.5",
    }
    assert finals["winner", "holdout"].recipe == result.recipe.to_dict()
    assert finals["winner", "holdout"].candidate == result.best.candidate
    assert finals["one", "holdout"].recipe is None
    assert "model-for-holdout" in controller.evaluated
    assert result.holdout is not None
    assert result.holdout.rows[0].name == "winner"
    assert len({final.scores for final in finals.values()}) == len(finals)
    assert list((controller.folder / "best").iterdir()) == [controller.folder / "best" / "recipe.yml"]
    assert len(result.commands) == 1
    assert controller.state() == "finished"


def test_the_winners_checkpoint_is_kept_when_asked_for(controller: Controller) -> None:
    controller.settings(export_model=True, baseline_scales=[])
    controller.start()
    assert (controller.folder / "best" / "model" / "recipe.yml").is_file()
    assert "model" in controller.evaluated
    assert not any(name.startswith("task arithmetic") for name, _ in controller.finals())


def test_a_finished_run_evaluates_nothing_and_starts_no_workers(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = controller.start()
    before = (controller.folder / "journal.jsonl").read_bytes()

    def refuse(*_: Any) -> None:
        raise AssertionError("no workers are needed")

    monkeypatch.setattr(run, "_start_pool", refuse)
    again = controller.resume()
    assert (again.best, again.holdout, again.recipe.hash) == (
        first.best,
        first.holdout,
        first.recipe.hash,
    )
    assert (controller.folder / "journal.jsonl").read_bytes() == before
    assert controller.state() == "finished"


def test_a_baseline_that_fails_is_reported_and_does_not_fail_the_run(controller: Controller) -> None:
    controller.decide = failing("one")
    result = controller.start()
    assert result.holdout is not None
    assert result.holdout.failed == {"one": "no memory left"}
    assert "one" not in [row.name for row in result.holdout.rows]


def test_scales_that_all_fail_are_left_out(controller: Controller) -> None:
    def decide(job: Job) -> Outcome:
        is_scale = job.recipe is not None and job.recipe.merge_method == "task_arithmetic"
        return Outcome(status=Status.INVALID, reason="no") if is_scale else score(job)

    controller.decide = decide
    controller.start()
    assert not any(name.startswith("task") for name, stage in controller.finals() if stage == "holdout")


def test_a_winner_that_cannot_be_scored_is_tried_again_on_resume(controller: Controller) -> None:
    controller.decide = failing("model-for-holdout")
    with pytest.raises(
        EvomergeError, match=r"winner's checkpoint cannot be scored: no memory left; .*resume"
    ):
        controller.start()
    assert controller.state() == "failed"
    assert "no memory left" in (controller.folder / "events.log").read_text()
    assert not (controller.folder / "best" / "model-for-holdout").exists()
    finals = controller.finals()
    assert ("winner", "holdout") not in finals
    assert ("one", "holdout") in finals

    controller.decide = score
    controller.evaluated.clear()
    result = controller.resume()
    assert controller.evaluated == ["model-for-holdout"]
    assert result.holdout is not None


def test_without_a_holdout_nothing_is_compared(controller: Controller) -> None:
    controller.ready.holdout_documents = ()
    controller.settings(export_model=True)
    result = controller.start()
    assert result.holdout is None
    assert {stage for _, stage in controller.finals()} == {"confirm"}
    assert (controller.folder / "best" / "model").is_dir()
    assert controller.resume().best == result.best


def test_without_a_base_there_is_no_task_arithmetic(controller: Controller) -> None:
    controller.ready.base = None
    assert single_scale(controller.ready) == {}
    controller.start()
    names = {name for name, stage in controller.finals() if stage != "confirm"}
    assert names == {"winner", "one", "two", "three", "uniform average"}


def test_names_of_models_and_baselines_never_clash(controller: Controller) -> None:
    controller.ready.sources = ("a/winner", "b/winner", "x/uniform average", "x/task arithmetic 1")
    assert model_labels(controller.ready) == {
        "a/winner": "a/winner",
        "b/winner": "b/winner",
        "x/uniform average": "x/uniform average",
        "x/task arithmetic 1": "x/task arithmetic 1",
        "models/base": "models/base",
    }
    controller.ready.sources = ("a/winner", "x/uniform average", "y/task arithmetic 1", "z/other")
    assert list(model_labels(controller.ready).values()) == [
        "model winner",
        "model uniform average",
        "model task arithmetic 1",
        "other",
        "base",
    ]


def test_equal_scales_are_one_baseline(controller: Controller) -> None:
    controller.settings(baseline_scales=[0.5, 0.5, 0.50000000001])
    assert list(single_scale(controller.ready)) == ["task arithmetic 0.5"]


def test_baselines_are_the_merges_they_are_called(controller: Controller) -> None:
    average = uniform_average(controller.ready).to_dict()
    assert average["merge_method"] == "linear"
    assert [model["parameters"]["weight"] for model in average["models"]] == [1, 1, 1]
    scaled = single_scale(controller.ready)["task arithmetic 1"].to_dict()
    assert (scaled["merge_method"], scaled["base_model"]) == ("task_arithmetic", "models/base")
    for recipe in (average, scaled):
        assert (recipe["dtype"], recipe["out_dtype"]) == ("float32", "float32")


# Around it


def test_a_run_that_cannot_start_leaves_nothing_behind(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise WorkerError("no worker")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_start_pool", refuse)
        with pytest.raises(WorkerError):
            controller.start()
    assert not controller.folder.exists()
    controller.start()


def test_what_a_crash_left_before_the_journal_had_a_header_is_no_run(controller: Controller) -> None:
    controller.folder.mkdir()
    (controller.folder / "lock").touch()
    (controller.folder / "journal.jsonl").touch()
    controller.start()
    with pytest.raises(RunExistsError, match="evomerge resume"):
        controller.start()


def test_a_folder_with_anything_else_in_it_is_refused(controller: Controller) -> None:
    controller.folder.mkdir()
    (controller.folder / "thesis.tex").touch()
    with pytest.raises(RunExistsError, match="not an empty folder"):
        controller.start()
    assert [path.name for path in controller.folder.iterdir()] == ["thesis.tex"]


def test_a_full_disk_while_scores_are_written_loses_nothing(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RunDir.write_scores

    def full(self: RunDir, name: str, samples: Any) -> str:
        if name == "5-search":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path / "scores"))
        return write(self, name, samples)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_scores", full)
        with pytest.raises(EvomergeError, match=r"the disk is full .*evomerge resume .*run`"):
            controller.start()
    assert controller.state() == "failed"
    recorded = Journal.load(controller.folder / "journal.jsonl").trials_by_number
    assert 5 not in recorded
    controller.resume()
    assert len(Journal.load(controller.folder / "journal.jsonl").trials) == 8


def test_an_interrupt_is_told_from_a_failure(controller: Controller) -> None:
    def interrupt(job: Job) -> Outcome:
        raise KeyboardInterrupt

    controller.decide = interrupt
    with pytest.raises(KeyboardInterrupt):
        controller.start()
    assert controller.state() == "interrupted"
    controller.decide = score
    assert controller.resume().best.fitness is not None


def test_outcomes_that_are_not_finite_do_not_become_baselines(controller: Controller) -> None:
    def decide(job: Job) -> Outcome:
        outcome = score(job)
        if job.checkpoint is not None and job.checkpoint.name == "two":
            return replace(outcome, metrics={"t": {"m,none": float("nan")}})
        return outcome

    controller.decide = decide
    result = controller.start()
    assert result.holdout is not None
    assert list(result.holdout.failed) == ["two"]
