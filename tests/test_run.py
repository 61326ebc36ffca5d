"""Real runs over real models and a real lm-eval task: stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import InputsChangedError, JournalDamagedError, RunExistsError, RunLockedError
from evomerge.fitness.objectives import estimate
from evomerge.journal import Journal
from evomerge.lock import RunLock
from evomerge.loop import StopFlag
from evomerge.plan.batch_size import LARGEST
from evomerge.report.status import read_objectives, run_status
from evomerge.report.trials import decode_trial
from evomerge.run import RunResult, resume_run, start_run
from evomerge.run_dir import RunDir
from tests.killed_runs import Silent
from tests.tasks import write_tasks
from tests.workers.scripted import wait_until_gone

EXPERIMENT = """\
name: tiny
base_model: zoo/base
models: [zoo/one, zoo/two]
search_space:
  type: parameter
  merge_method: task_arithmetic
  parameters: {weight: {low: 0, high: 60, start: 10}}
objectives:
  - {task: choose, metric: acc}
  - {task: gen, metric: exact_match, filter: first, weight: 2}
search: {algorithm: cma-es, evaluations: 12, seed: 3, population: 6}
evaluation: {holdout: 0.4, include_path: [tasks]}
workers: {backend: inline}
finish: {baseline_scales: [0.5]}
"""


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment with its models and tasks, and a run of it from beginning to end."""

    folder: Path
    result: RunResult

    @property
    def experiment(self) -> Path:
        return self.folder / "experiment.yml"

    @property
    def run_dir(self) -> Path:
        return self.result.run_dir


def recorded(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must not depend on kills, backends or the order of arrival."""
    trials = Journal.load(run_dir / "journal.jsonl").trials
    return [
        (trial.number, trial.candidate, trial.genome, trial.fitness, trial.metrics, trial.asked_after)
        for trial in sorted(trials, key=lambda trial: trial.number)
    ]


def finals(run_dir: Path) -> dict[tuple[str, str], Any]:
    journal = Journal.load(run_dir / "journal.jsonl")
    return {(final.name, final.stage): final.metrics for final in journal.finals}


@pytest.fixture(scope="module")
def study(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(tiny_zoo, folder / "zoo")
    write_tasks(folder / "tasks", count=20)
    (folder / "experiment.yml").write_text(EXPERIMENT)
    result = start_run(folder / "experiment.yml", folder / "whole", observer=Silent(), stop=StopFlag())
    return Study(folder=folder, result=result)


def resume(run_dir: Path) -> RunResult:
    return resume_run(run_dir, observer=Silent(), stop=StopFlag())


@pytest.fixture
def copied_run(study: Study, tmp_path: Path) -> Path:
    """The finished run, to be spoilt."""
    return shutil.copytree(study.run_dir, tmp_path / "run")


# A run in one piece


def test_a_finished_run_holds_everything_it_promises(study: Study) -> None:
    trials = recorded(study.run_dir)
    assert [entry[0] for entry in trials] == list(range(12))
    assert len({entry[3] for entry in trials}) > 1, "a flat fitness would prove nothing"
    found = set(finals(study.run_dir))
    confirmed = {name for name, stage in found if stage == "confirm"}
    assert f"trial {study.result.best.number}, part 0" in confirmed
    assert len(confirmed) == 7
    assert {entry for entry in found if entry[1] != "confirm"} == {
        ("task arithmetic 0.5", "search"),
        *((name, "holdout") for name in ("winner", "one", "two", "base", "uniform average")),
        ("task arithmetic 0.5", "holdout"),
    }
    table = study.result.holdout
    assert table is not None
    assert table.failed == {}
    assert {row.num_documents for row in table.rows} == {16}
    assert list((study.run_dir / "best").iterdir()) == [study.run_dir / "best" / "recipe.yml"]
    assert len(study.result.commands) == 2
    header = Journal.load(study.run_dir / "journal.jsonl").header
    assert {"model", "task"} == {name.split()[0] for name in header.inputs}
    assert len(header.inputs) == 5


def test_the_batch_size_found_at_the_start_is_kept_whatever_the_machine(
    study: Study, copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = Journal.load(copied_run / "journal.jsonl").header
    assert header.settings["evaluation"]["batch_size"] == LARGEST
    assert f"batch_size: {LARGEST}" in (copied_run / "experiment.yml").read_text()
    monkeypatch.setattr("evomerge.plan.batch_size.memory_of", lambda _device: 10**6)
    again = resume(copied_run)
    assert again.commands
    assert all(f"--batch_size {LARGEST}" in command for command in again.commands)


def test_the_status_of_a_finished_run_has_its_table(study: Study) -> None:
    found = run_status(study.run_dir)
    assert found["state"] == "finished"
    assert found["evaluations"] == {"done": 12, "total": 12}
    assert found["best"]["trial"] == study.result.best.number
    assert study.result.holdout is not None
    assert found["holdout"] == study.result.holdout.to_dict()
    assert json.loads(json.dumps(found))["holdout"]["rival"] == study.result.holdout.rival


def test_every_trial_is_recorded_with_the_error_of_its_fitness(study: Study) -> None:
    run_dir, journal = RunDir(study.run_dir), Journal.load(study.run_dir / "journal.jsonl")
    objectives = read_objectives(journal)
    for trial in journal.trials:
        found = estimate(run_dir.read_scores(trial.scores), objectives)
        assert found.mean == pytest.approx(trial.fitness)
        assert trial.standard_error == found.standard_error


def test_every_trial_can_be_decoded_again(study: Study) -> None:
    trials = Journal.load(study.run_dir / "journal.jsonl").trials
    for trial in trials:
        assert decode_trial(study.run_dir, trial.number).recipe.hash == trial.candidate
    assert decode_trial(study.run_dir, None).recipe.hash == study.result.best.candidate


def test_a_finished_run_is_shown_again_without_workers(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no workers are needed")

    monkeypatch.setattr("evomerge.run.build_pool", refuse)
    before = RunDir(study.run_dir).journal.read_bytes()
    again = resume(study.run_dir)
    assert again == study.result
    assert RunDir(study.run_dir).journal.read_bytes() == before


def test_an_end_cut_off_is_done_again_to_the_same_table(study: Study, copied_run: Path) -> None:
    """The winner and two others are lost; the checkpoint is written anew from the journal alone."""
    journal = copied_run / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kind":"final"' not in line or '"name":"one"' in line]
    assert len(kept) == 14
    journal.write_text("".join(kept))
    shutil.rmtree(copied_run / "best")
    result = resume(copied_run)
    assert finals(copied_run) == finals(study.run_dir)
    assert result.holdout == study.result.holdout
    assert (copied_run / "best" / "recipe.yml").read_text() == (
        study.run_dir / "best" / "recipe.yml"
    ).read_text()
    assert list((copied_run / "best").iterdir()) == [copied_run / "best" / "recipe.yml"]


# Refusals


def test_a_second_run_in_the_same_folder_is_refused(study: Study) -> None:
    with pytest.raises(RunExistsError, match="evomerge resume"):
        start_run(study.experiment, study.run_dir, observer=Silent(), stop=StopFlag())


def test_a_second_controller_is_refused(copied_run: Path) -> None:
    before = (copied_run / "journal.jsonl").read_bytes()
    with RunLock(copied_run):
        assert run_status(copied_run)["state"] == "running"
        with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
            resume(copied_run)
    assert (copied_run / "journal.jsonl").read_bytes() == before
    assert run_status(copied_run)["state"] == "finished"


@contextmanager
def changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    before = path.read_bytes()
    after = change(before)
    assert after != before
    path.write_bytes(after)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_a_changed_experiment_is_refused_with_what_changed(copied_run: Path) -> None:
    with (
        changed(copied_run / "experiment.yml", lambda text: text.replace(b"seed: 3", b"seed: 4")),
        pytest.raises(InputsChangedError, match=r"search\.seed: 3 -> 4"),
    ):
        resume(copied_run)
    assert resume(copied_run).best.number >= 0


def test_a_lost_experiment_file_is_written_again(study: Study, copied_run: Path) -> None:
    (copied_run / "experiment.yml").unlink()
    assert resume(copied_run).holdout == study.result.holdout
    assert (copied_run / "experiment.yml").read_text() == (study.run_dir / "experiment.yml").read_text()


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("zoo/one/model.safetensors", b"", b"", r"model .*zoo/one: \w+ -> \w+"),
        ("tasks/gen.jsonl", b'"a": "', b'"a": "x', r"task gen: \w+ -> \w+"),
        ("tasks/choose.yaml", b"{{q}}=", b"{{q}}:", r"task choose: \w+ -> \w+"),
    ],
)
def test_changed_models_and_data_are_refused(
    study: Study, copied_run: Path, file: str, old: bytes, new: bytes, named: str
) -> None:
    def change(data: bytes) -> bytes:
        return data.replace(old, new, 1) if old else data[:-1] + bytes([data[-1] ^ 1])

    with changed(study.folder / file, change), pytest.raises(InputsChangedError, match=named):
        resume(copied_run)


def test_a_damaged_journal_is_refused_before_anything_else(copied_run: Path) -> None:
    with (
        changed(copied_run / "journal.jsonl", lambda text: text.replace(b'"trial":3', b'"trial":4')),
        pytest.raises(JournalDamagedError, match="line 5"),
    ):
        resume(copied_run)


# Signals and kills, from outside


def evomerge(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_trials(process: subprocess.Popen[str], run_dir: Path, count: int) -> None:
    journal = run_dir / "journal.jsonl"
    until = time.monotonic() + 120
    while not journal.exists() or len(journal.read_bytes().splitlines()) <= count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def family(pid: int) -> list[int]:
    """A process's children, and theirs.

    But for two helpers of Ray's, which hold no memory to speak of: they notice by themselves that Ray is gone
    and then wait a minute for its answer before they go too.
    """
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            name = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"DashboardAgent" not in name and b"RuntimeEnvAgent" not in name:
                found += [child, *family(child)]
    return found


def test_sigusr1_stops_a_run_in_order_and_it_continues_identically(study: Study, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = evomerge("run", study.experiment, "--run-dir", run_dir)
    wait_for_trials(process, run_dir, 2)
    assert run_status(run_dir)["state"] == "running"
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by SIGUSR1" in err
    assert f"evomerge resume {run_dir}" in err
    assert out == ""
    assert run_status(run_dir)["state"] == "stopped"
    assert 2 <= len(recorded(run_dir)) < 12
    result = resume(run_dir)
    assert recorded(run_dir) == recorded(study.run_dir)
    assert finals(run_dir) == finals(study.run_dir)
    assert result.holdout == study.result.holdout


def test_a_ray_run_survives_sigkill_and_sigterm(study: Study, tmp_path: Path) -> None:
    """Killed, resumed, stopped, resumed: the same as the run in one piece, and no process is left."""
    run_dir = tmp_path / "run"
    workers = ["--set", "workers.backend=ray", "--set", "workers.count=2"]
    process = evomerge("run", study.experiment, "--run-dir", run_dir, *workers)
    wait_for_trials(process, run_dir, 2)
    started = family(process.pid)
    assert len(started) >= 4
    process.kill()
    process.communicate()
    assert wait_until_gone(started, seconds=30) == []
    assert run_status(run_dir)["state"] == "killed"
    before = recorded(run_dir)
    assert 2 <= len(before) < 12

    process = evomerge("resume", run_dir)
    wait_for_trials(process, run_dir, len(before) + 1)
    assert run_status(run_dir)["state"] == "running"
    started = family(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by SIGTERM" in err
    assert wait_until_gone(started, seconds=30) == []

    process = evomerge("resume", run_dir)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "winner" in out
    assert recorded(run_dir) == recorded(study.run_dir)
    assert finals(run_dir) == finals(study.run_dir)
    assert run_status(run_dir)["state"] == "finished"
    assert not (run_dir / "best" / "model-for-holdout").exists()
