"""The state of a run, from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigurationError
from evomerge.fitness.constraints import Constraint
from evomerge.fitness.objectives import Objective
from evomerge.journal import Journal
from evomerge.lock import RunLock, is_locked
from evomerge.records import Final, Header, SampleScores, Status, Trial
from evomerge.report.status import read_constraints, read_objectives, run_status
from evomerge.report.trials import decode_trial
from evomerge.run_dir import RunDir

SETTINGS = {
    "name": "tiny",
    "search": {"evaluations": 9},
    "objectives": [{"task": "t", "metric": "m", "filter": "none", "weight": 2.0, "direction": "minimize"}],
}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path)
    found.create()
    header = Header(experiment="e", settings=SETTINGS, inputs={}, versions={}, seed=0)
    with Journal.create(found.journal, header) as journal:
        for number, fitness in enumerate((0.5, None, 0.75)):
            status = Status.INVALID if fitness is None else Status.OK
            trial = Trial(
                number=number,
                candidate=f"c{number}",
                genome=(),
                asked_after=0,
                status=status,
                fitness=fitness,
                metrics={} if fitness is None else {"t": {"m,none": -fitness}},
            )
            journal.append(trial)
    return found


def test_progress_comes_from_the_journal(run_dir: RunDir) -> None:
    run_dir.write_status({"state": "searching", "evaluations": {"done": 999}})
    found = run_status(run_dir.path)
    assert found["evaluations"] == {"done": 3, "total": 9}
    assert found["invalid"] == 1
    metrics = {"t": {"m,none": -0.75}}
    assert found["best"] == {
        "trial": 2,
        "candidate": "c2",
        "fitness": 0.75,
        "standard_error": None,
        "metrics": metrics,
    }
    front = {
        "trial": 2,
        "candidate": "c2",
        "fitness": 0.75,
        "standard_error": None,
        "metrics": {"t m": -0.75},
        "standard_errors": {"t m": None},
    }
    assert found["front"] == [front]
    assert found["holdout"] is None
    assert found["name"] == "tiny"


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "interrupted"])
def test_a_run_that_ended_says_how(run_dir: RunDir, state: str) -> None:
    run_dir.write_status({"state": state})
    assert run_status(run_dir.path)["state"] == state


@pytest.mark.parametrize("written", ["searching", "finishing", "stopped", "failed", None])
def test_a_run_is_running_as_long_as_its_lock_is_held(run_dir: RunDir, written: str | None) -> None:
    """A resumed run still has the state in which it ended before."""
    if written is not None:
        run_dir.write_status({"state": written})
    assert not is_locked(run_dir.path)
    with RunLock(run_dir.path):
        assert is_locked(run_dir.path)
        assert run_status(run_dir.path)["state"] == "running"
    ended = run_status(run_dir.path)["state"]
    assert ended == (written if written in ("stopped", "failed") else "killed")


def test_a_run_is_read_while_a_record_is_half_written(run_dir: RunDir) -> None:
    with run_dir.journal.open("ab") as file:
        file.write(b'{"kind":"trial","tri')
    before = run_dir.journal.read_bytes()
    assert run_status(run_dir.path)["evaluations"]["done"] == 3
    assert run_dir.journal.read_bytes() == before
    assert json.dumps(run_status(run_dir.path))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run"):
        run_status(tmp_path / "nowhere")


def test_objectives_are_read_as_they_were_resolved(run_dir: RunDir) -> None:
    expected = Objective(task="t", metric="m", filter="none", weight=2.0, maximize=False)
    assert read_objectives(Journal.load(run_dir.journal)) == (expected,)


def test_what_constrains_and_what_is_normalised_is_read_from_the_journal(tmp_path: Path) -> None:
    bound = {"task": "t", "metric": "m", "filter": "none", "direction": "minimize", "retention": 0.9}
    objective = {**SETTINGS["objectives"][0], "normalize": "sources"}  # type: ignore[index,dict-item]
    settings = {**SETTINGS, "objectives": [objective], "constraints": [bound]}
    header = Header(experiment="e", settings=settings, inputs={}, versions={}, seed=0)
    with Journal.create(tmp_path / "journal.jsonl", header) as journal:
        assert read_objectives(journal)[0].normalize
        expected = Constraint(
            task="t", metric="m", filter="none", maximize=False, kind="retention", limit=0.9
        )
        assert read_constraints(journal) == (expected,)


def test_shares_of_the_sources_are_known_before_the_holdout(tmp_path: Path) -> None:
    objective = {**SETTINGS["objectives"][0], "normalize": "sources"}  # type: ignore[index,dict-item]
    header = Header(
        experiment="e", settings={**SETTINGS, "objectives": [objective]}, inputs={}, versions={}, seed=0
    )
    found = RunDir(tmp_path)
    found.create()
    scores = {"t": SampleScores(doc_ids=(0, 1), values={"m,none": (1.0, 3.0)})}
    scored: dict[str, Any] = {"status": Status.OK, "metrics": {"t": {"m,none": 2.0}}}
    with Journal.create(found.journal, header) as journal:
        for name, stage, candidate in (("one", "search", ""), ("trial 0, part 0", "confirm", "c0")):
            file = found.write_scores(f"{name}-{stage}", scores)
            journal.append(
                Final(name=name, stage=stage, candidate=candidate, recipe=None, scores=file, **scored)  # type: ignore[arg-type]
            )
        file = found.write_scores("0-search", scores)
        journal.append(
            Trial(number=0, candidate="c0", genome=(), asked_after=0, fitness=1.0, scores=file, **scored)
        )
    assert run_status(tmp_path)["audit"]["noise_floor"] == 0


def test_a_trial_that_is_not_recorded_is_named(run_dir: RunDir) -> None:
    with pytest.raises(ConfigurationError, match="no trial 7 is recorded; 3 trials are"):
        decode_trial(run_dir.path, 7)
