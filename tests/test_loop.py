"""A killed and resumed search is the undisturbed one, and whatever would falsify it is refused."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import NoValidCandidateError, ReplayMismatchError, RunStoppedError
from evomerge.journal import Journal
from evomerge.loop import Run, StopFlag, checked
from evomerge.race import Course
from evomerge.recipe import Recipe
from evomerge.records import Final, Header, Outcome, Status, Trial
from evomerge.run_dir import RunDir
from evomerge.search import build_searcher
from evomerge.search.cma_es import CmaEsOptions
from evomerge.stages import Stage, best_trial
from evomerge.versions import library_versions
from evomerge.workers.base import Job
from tests.killed_runs import (
    FULL_DISK,
    OBJECTIVES,
    SEARCH,
    ShufflingPool,
    Silent,
    WeightSpace,
    num_scored,
    score,
    weights,
)

ROOT = Path(__file__).parents[1]


def header() -> Header:
    return Header(experiment="e", settings={}, inputs={}, versions=library_versions(), seed=5)


class Script(ShufflingPool):
    """A pool whose outcomes a function decides."""

    def __init__(self, folder: Path, seed: int, decide: Callable[[Job], Outcome]) -> None:
        super().__init__(folder / "evaluated.log", seed)
        self._decide = decide

    def next(self, timeout: float) -> tuple[int, Outcome] | None:
        job = self._jobs.pop(self._rng.randrange(len(self._jobs)))
        return job.number, self._decide(job)


def make_run(
    folder: Path,
    journal: Journal,
    *,
    evaluations: int = 15,
    decide: Callable[[Job], Outcome] = score,
    order: int = 0,
    stop: StopFlag | None = None,
    space: WeightSpace | None = None,
) -> Run:
    space = space or WeightSpace()
    run_dir = RunDir(folder)
    run_dir.create()
    return Run(
        run_dir=run_dir,
        journal=journal,
        stage=Stage(
            name="search",
            space=space,
            new_searcher=lambda: build_searcher("cma-es", space.dimensions, 5, CmaEsOptions(population=6)),
            evaluations=evaluations,
        ),
        objectives=OBJECTIVES,
        documents=SEARCH,
        evaluations=evaluations,
        pool=Script(folder, order, decide),
        observer=Silent(),
        stop=stop or StopFlag(),
    )


def search(folder: Path, **options: Any) -> list[Trial]:
    folder.mkdir(parents=True, exist_ok=True)
    with Journal.create(folder / "journal.jsonl", header()) as journal:
        make_run(folder, journal, **options).search()
        return sorted(journal.trials, key=lambda trial: trial.number)


def told(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.genome, trial.fitness, trial.status, trial.asked_after) for trial in trials]


# Kills


def killed_runs(*options: str) -> list[dict[str, Any]]:
    """In memory where that is possible: a killed process loses nothing there either, and fsync is quick."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.killed_runs", folder, "0", *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return killed_runs()


def test_a_race_killed_at_any_point_continues_as_if_undisturbed() -> None:
    whole, *killed = killed_runs("racing")
    assert "pruned" in {trial[4] for trial in whole["trials"]}
    total = len(whole["evaluated"])
    assert total == whole["blocks"] + num_scored(whole["finals"])
    assert whole["blocks"] < 3 * len(whole["trials"])
    assert len(killed) >= 30
    for report in killed:
        code = 1 if report["point"][0] == FULL_DISK else -9
        assert report["codes"] == [code, 0], report["point"]
        for key in ("trials", "finals", "blocks", "best", "left"):
            assert report[key] == whole[key], (report["point"], key)
        done = report["recorded_blocks"] + report["recorded_finals"]
        assert len(report["evaluated"]) == total - done, report["point"]


def test_a_run_killed_at_any_point_or_out_of_disk_continues_as_if_undisturbed(
    reports: list[dict[str, Any]],
) -> None:
    whole, *killed = reports
    assert whole["code"] == 0
    assert len(whole["trials"]) == 32
    assert len(killed) >= 30
    for report in killed:
        code = 1 if report["point"][0] == FULL_DISK else -9
        assert report["codes"] == [code, 0], report["point"]
        for key in ("trials", "finals", "best", "left"):
            assert report[key] == whole[key], (report["point"], key)
        assert report["status"]["state"] == "finished"
        assert report["status"]["holdout"] == whole["status"]["holdout"]


def test_no_recorded_evaluation_runs_again(reports: list[dict[str, Any]]) -> None:
    whole, *killed = reports
    total = len(whole["evaluated"])
    assert total == len(whole["trials"]) + num_scored(whole["finals"])
    for report in killed:
        evaluated = report["evaluated"]
        assert len(evaluated) == total - len(report["recorded"]) - report["recorded_finals"], report["point"]
        assert len(set(evaluated)) == len(evaluated)
        assert not set(evaluated) & set(report["recorded"]), report["point"]
    assert {report["point"][0] for report in killed} >= {
        "after ask",
        "before the record",
        "during the write",
        "before fsync",
        "after the record",
        "before tell",
        "after tell",
        "before the scores",
        "in the export",
        "before removing the checkpoint",
        FULL_DISK,
    }


def test_the_checkpoint_of_the_holdout_is_removed(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["left"] == ["recipe.yml"], report.get("point")


# Order


def test_the_order_in_which_workers_finish_changes_nothing(tmp_path: Path) -> None:
    first = search(tmp_path / "a", order=0)
    for order in (1, 2):
        other = search(tmp_path / str(order), order=order)
        assert told(other) == told(first)
        assert best_trial(other) == best_trial(first)
    arrivals = [trial.number for trial in Journal.load(tmp_path / "1" / "journal.jsonl").trials]
    assert arrivals != sorted(arrivals)


def test_the_earliest_of_equals_is_the_best() -> None:
    trial = Trial(number=0, candidate="", genome=(), asked_after=0, status=Status.OK, fitness=0.5)
    trials = [replace(trial, number=number) for number in (3, 1, 2)]
    invalid = replace(trial, number=0, status=Status.INVALID, fitness=None)
    for order in itertools.permutations([*trials, invalid]):
        assert best_trial(order) == trials[1]
    assert best_trial([invalid]) is None


def test_a_candidate_that_was_scored_before_is_not_scored_again(tmp_path: Path) -> None:
    class Coarse(WeightSpace):
        def decode(self, genome: tuple[float, ...]) -> Recipe:
            return super().decode(tuple(round(number) for number in genome))

    scored: list[str] = []

    def decide(job: Job) -> Outcome:
        assert job.recipe is not None
        scored.append(job.recipe.hash)
        return score(job)

    trials = search(tmp_path, decide=decide, space=Coarse(), evaluations=24)
    assert len(trials) == 24
    assert len(scored) == len(set(scored)) == len({trial.candidate for trial in trials}) < 24
    by_candidate: dict[str, Trial] = {}
    for trial in trials:
        first = by_candidate.setdefault(trial.candidate, trial)
        assert (trial.fitness, trial.metrics, trial.scores) == (first.fitness, first.metrics, first.scores)
        assert trial.attempts == (1 if trial is first else 0)


def test_a_candidate_whose_machinery_failed_gets_another_chance_in_a_later_generation(tmp_path: Path) -> None:
    class Coarse(WeightSpace):
        def decode(self, genome: tuple[float, ...]) -> Recipe:
            return super().decode((round(genome[0]), 0.5, 0.5))

    seen: Counter[str] = Counter()

    def decide(job: Job) -> Outcome:
        assert job.recipe is not None
        seen[job.recipe.hash] += 1
        if weights(job.recipe)[0] == 1 and seen[job.recipe.hash] == 1:
            return Outcome(status=Status.FAILED, reason="a dead worker")
        return score(job)

    trials = search(tmp_path, decide=decide, space=Coarse(), evaluations=12)
    ones = [trial for trial in trials if trial.genome[0] > 0.5]
    early, late = ([t for t in ones if (t.number >= 6) == is_late] for is_late in (False, True))
    assert len(early) > 1
    assert len(late) > 0
    assert {trial.status for trial in early} == {Status.FAILED}
    assert {trial.status for trial in late} == {Status.OK}
    assert [trial.attempts for trial in (*early, *late)] == [1] + [0] * (len(early) - 1) + [1] + [0] * (
        len(late) - 1
    )


def test_the_budget_is_spent_exactly_and_a_cut_generation_is_not_told(tmp_path: Path) -> None:
    trials = search(tmp_path, evaluations=8)
    assert [trial.number for trial in trials] == list(range(8))
    assert [trial.asked_after for trial in trials] == [0] * 6 + [6] * 2


# What is invalid


def invalid(_job: Job) -> Outcome:
    return Outcome(status=Status.INVALID, reason="the logits are not finite")


def test_a_generation_without_a_valid_candidate_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        NoValidCandidateError, match=r"none of the 6 candidates of generation 0 .* not finite"
    ):
        search(tmp_path, decide=invalid)
    assert NoValidCandidateError.exit_code == 4
    assert len(Journal.load(tmp_path / "journal.jsonl").trials) == 6


def test_a_later_generation_of_only_invalid_ones_stops_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(NoValidCandidateError, match="of generation 1"):
        search(tmp_path, decide=lambda job: score(job) if job.number < 6 else invalid(job))


def test_a_race_that_none_ends_in_a_valid_way_stops_the_run(tmp_path: Path) -> None:
    """Whoever it stopped before has a fitness to go by, but is not known to be valid."""
    (documents,) = SEARCH
    *early, late = documents.doc_ids
    blocks = [(replace(documents, doc_ids=ids),) for ids in (tuple(early), (late,))]
    course = Course(blocks=blocks, error_rate=0.4)

    def decide(job: Job) -> Outcome:
        return invalid(job) if any(late in subset.doc_ids for subset in job.documents) else score(job)

    with Journal.create(tmp_path / "journal.jsonl", header()) as journal:
        run = make_run(tmp_path, journal, decide=decide)
        run.course = course
        with pytest.raises(NoValidCandidateError, match="candidates of generation 0 is valid"):
            run.search()
        statuses = {trial.status for trial in journal.trials}
    assert statuses == {Status.PRUNED, Status.INVALID}


def test_an_invalid_rest_of_the_last_generation_does_not_spoil_a_search(tmp_path: Path) -> None:
    trials = search(
        tmp_path, evaluations=7, decide=lambda job: score(job) if job.number < 6 else invalid(job)
    )
    assert trials[6].status is Status.INVALID
    with pytest.raises(NoValidCandidateError):
        search(tmp_path / "small", evaluations=2, decide=invalid)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_never_wins(tmp_path: Path, value: float) -> None:
    def decide(job: Job) -> Outcome:
        outcome = score(job)
        return replace(outcome, metrics={"t": {"m,none": value}}) if job.number == 2 else outcome

    trials = search(tmp_path, decide=decide)
    assert (trials[2].status, trials[2].fitness, trials[2].scores) == (Status.INVALID, None, "")
    assert f"t m,none is {value}" in trials[2].reason
    assert all(trial.status is Status.OK for trial in trials if trial.number not in (2, 3, 10))


def test_finite_and_failed_outcomes_are_left_as_they_are() -> None:
    for outcome in (
        Outcome(status=Status.OK, metrics={"t": {"m": -1e300}}),
        Outcome(status=Status.FAILED, reason="x", metrics={"t": {"m": float("nan")}}),
    ):
        assert checked(outcome) is outcome


# Scores


def test_scores_of_every_valid_trial_lie_in_their_file(tmp_path: Path) -> None:
    for trial in search(tmp_path):
        if trial.fitness is None:
            assert trial.scores == ""
            continue
        assert trial.scores == f"scores/{trial.number}-search.npz"
        (found,) = RunDir(tmp_path).read_scores(trial.scores).values()
        assert found.doc_ids == SEARCH[0].doc_ids
        (column,) = found.values.values()
        assert sum(column) / len(column) == trial.fitness


# Stop, drift


def test_a_stop_ends_the_run_between_evaluations_and_it_continues(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole")
    stop = StopFlag()

    def decide(job: Job) -> Outcome:
        if job.number == 8:
            stop.set("SIGTERM")
            stop.set("SIGUSR1")
        return score(job)

    folder = tmp_path / "stopped"
    with pytest.raises(RunStoppedError, match=r"stopped by SIGTERM; .*evomerge resume .*stopped"):
        search(folder, decide=decide, stop=stop)
    with Journal.open(folder / "journal.jsonl") as journal:
        assert 6 < len(journal.trials) < 15
        assert 8 in journal.trials_by_number
        make_run(folder, journal, order=9).search()
        assert told(sorted(journal.trials, key=lambda trial: trial.number)) == told(whole)


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    """Write a journal anew, with right checksums."""
    journal = Journal.load(path)
    path.unlink()
    with Journal.create(path, change(journal.header)) as fresh:
        for record in [*journal.trials, *journal.finals]:
            fresh.append(change(record))


def drifted(record: Header | Trial | Final) -> Header | Trial | Final:
    if isinstance(record, Trial) and record.number == 7:
        return replace(record, genome=(record.genome[0] + 1e-16, *record.genome[1:]))
    return record


def test_a_genome_that_comes_out_otherwise_is_refused(tmp_path: Path) -> None:
    search(tmp_path)
    path = tmp_path / "journal.jsonl"
    rewritten(path, drifted)
    with (
        Journal.open(path) as journal,
        pytest.raises(ReplayMismatchError, match=r"trial 7 .*no recorded version has changed"),
    ):
        make_run(tmp_path, journal).search()


def test_drift_names_what_changed_since(tmp_path: Path) -> None:
    search(tmp_path)
    path = tmp_path / "journal.jsonl"

    def change(record: Any) -> Any:
        if isinstance(record, Header):
            versions = {**record.versions, "cma": "1.0", "processor": "abacus"}
            return replace(record, versions=versions)
        return drifted(record)

    rewritten(path, change)
    with Journal.open(path) as journal, pytest.raises(ReplayMismatchError) as caught:
        make_run(tmp_path, journal).search()
    now = library_versions()
    assert f"cma 1.0 -> {now['cma']}" in str(caught.value)
    assert f"processor abacus -> {now['processor']}" in str(caught.value)
    assert "numpy" not in str(caught.value)


def test_the_header_names_libraries_and_the_kind_of_processor() -> None:
    versions = library_versions()
    import platform

    assert versions["processor"].startswith(platform.machine())
    assert versions["python"] == platform.python_version()
    assert versions["numpy"][0].isdigit()


def test_any_prefix_of_a_journal_continues_to_the_same_search(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole")
    text = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    for count in random.Random(0).sample(range(1, 16), 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "journal.jsonl").write_text("".join(text[:count]))
        with Journal.open(folder / "journal.jsonl") as journal:
            make_run(folder, journal, order=count).search()
            assert told(sorted(journal.trials, key=lambda trial: trial.number)) == told(whole)
