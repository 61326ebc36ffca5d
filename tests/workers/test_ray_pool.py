"""Whatever happens to a worker costs at most its own evaluation, and leaves no process behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import WorkerError
from evomerge.records import Outcome, Status
from evomerge.workers.base import Job, WorkerSpec
from evomerge.workers.inline import InlinePool
from evomerge.workers.ray_pool import RayPool
from evomerge.workers.worker import Worker
from tests.workers.scripted import ScriptedWorker, is_alive, job, pids, scripted_spec, wait_until_gone
from tests.workers.test_worker import recipe_jobs

pytestmark = pytest.mark.usefixtures("local_ray")


@contextmanager
def scripted_pool(folder: Path, **options: Any) -> Iterator[RayPool]:
    settings = {"count": 2, "gpus_per_worker": 0.0, "timeout": 60.0, "retries": 2, **options}
    with closing(RayPool(scripted_spec(folder), make_worker=ScriptedWorker, **settings)) as pool:
        yield pool


def carry_out(pool: RayPool | InlinePool, jobs: list[Job]) -> tuple[dict[int, Outcome], list[str]]:
    outcomes: dict[int, Outcome] = {}
    events: list[str] = []
    for each in jobs:
        pool.submit(each)
    until = time.monotonic() + 60
    while len(outcomes) < len(jobs):
        assert time.monotonic() < until, "the pool hangs"
        finished = pool.next(0.5)
        events += pool.events
        if finished is not None:
            number, outcome = finished
            assert number not in outcomes, "one outcome per job"
            outcomes[number] = outcome
    assert pool.next(0.0) is None
    return outcomes, events


def scores(outcomes: dict[int, Outcome]) -> dict[int, Any]:
    """What must be the same wherever a job ran."""
    return {number: replace(outcome, seconds={}, attempts=1) for number, outcome in sorted(outcomes.items())}


def test_what_no_judge_could_mark_is_told_at_once_and_costs_no_worker(tmp_path: Path) -> None:
    with scripted_pool(tmp_path, count=1) as pool:
        outcomes, events = carry_out(pool, [job(0, "unavailable"), job(1)])
    assert [outcome.status for _, outcome in sorted(outcomes.items())] == [Status.UNAVAILABLE, Status.OK]
    assert outcomes[0].reason == "the judge is away"
    assert events == []
    assert len({*pids(tmp_path, 0), *pids(tmp_path, 1)}) == 1


def test_two_workers_give_the_outcomes_of_one_in_process(spec: WorkerSpec) -> None:
    jobs = recipe_jobs(spec, [0.1, 0.5, 1.0, 0.5])
    inline, _ = carry_out(InlinePool(Worker(spec)), jobs)
    options: dict[str, Any] = {"gpus_per_worker": 0.0, "timeout": 120.0, "retries": 0}
    with closing(RayPool(spec, count=2, **options)) as pool:
        assert pool.size == 2
        processes: list[int] = []
        while len(processes) < 2:  # or one of them does all the work before the other is up
            assert pool.next(60.0) is None
            processes = pool.pids()
        remote, _ = carry_out(pool, jobs)
        assert len(set(processes)) == 2
    assert scores(remote) == scores(inline)
    assert all(outcome.status is Status.OK for outcome in remote.values())
    assert wait_until_gone(processes) == []


@pytest.mark.parametrize("word", ["die", "memory", "raise"])
def test_a_lost_attempt_is_repeated_once_in_a_fresh_process(tmp_path: Path, word: str) -> None:
    with scripted_pool(tmp_path) as pool:
        outcomes, events = carry_out(pool, [job(0), job(1, word, "score"), job(2), job(3)])
    assert {number: outcome.metrics for number, outcome in outcomes.items()} == {
        number: {"t": {"m": number / 7}} for number in range(4)
    }
    assert [outcomes[number].attempts for number in range(4)] == [1, 2, 1, 1]
    first, second = pids(tmp_path, 1)
    assert first != second
    assert all(first not in pids(tmp_path, number) for number in (2, 3)) or word != "memory"
    assert wait_until_gone([first]) == []
    assert len(events) == 1
    assert "job 1 is tried again" in events[0]


def test_a_job_that_keeps_killing_its_worker_fails_after_its_retries(tmp_path: Path) -> None:
    with scripted_pool(tmp_path, retries=1) as pool:
        outcomes, _ = carry_out(pool, [job(0, "die"), job(1, "memory"), job(2, "raise"), job(3)])
    assert [outcomes[number].status for number in range(4)] == [Status.FAILED] * 3 + [Status.OK]
    assert [outcomes[number].attempts for number in range(4)] == [2, 2, 2, 1]
    assert "worker died" in outcomes[0].reason
    assert "MemoryError: too much" in outcomes[1].reason
    assert "RuntimeError: a bug" in outcomes[2].reason
    assert all("2 attempts" in outcomes[number].reason for number in range(3))


def test_a_worker_that_ran_out_of_memory_is_replaced_without_retries_too(tmp_path: Path) -> None:
    with scripted_pool(tmp_path, count=1, retries=0) as pool:
        outcomes, _ = carry_out(pool, [job(0, "memory"), job(1)])
    assert [outcomes[number].status for number in range(2)] == [Status.FAILED, Status.OK]
    assert pids(tmp_path, 0) != pids(tmp_path, 1)


def test_a_hang_ends_at_its_deadline_and_its_process_is_gone(tmp_path: Path) -> None:
    with scripted_pool(tmp_path, timeout=1.5, retries=1) as pool:
        outcomes, events = carry_out(pool, [job(0, "hang"), job(1, "slow"), job(2)])
        assert wait_until_gone(pids(tmp_path, 0)) == []
    assert outcomes[0].status is Status.FAILED
    assert "no answer within 1.5 s" in outcomes[0].reason
    assert [outcomes[number].attempts for number in range(3)] == [2, 1, 1]
    assert "a worker hangs and is killed" in events


def test_an_idle_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    import os

    with scripted_pool(tmp_path, count=1) as pool:
        carry_out(pool, [job(0)])
        (process,) = pool.pids()
        os.kill(process, signal.SIGKILL)
        assert wait_until_gone([process]) == []
        outcomes, _ = carry_out(pool, [job(1)])
    assert outcomes[1].status is Status.OK


def test_workers_are_offline(tmp_path: Path) -> None:
    with scripted_pool(tmp_path, count=1) as pool:
        outcomes, _ = carry_out(pool, [job(0, "offline")])
    assert outcomes[0].counts == {"HF_HUB_OFFLINE": 1, "HF_DATASETS_OFFLINE": 1}


def test_a_worker_that_cannot_be_set_up_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with scripted_pool(tmp_path) as pool, pytest.raises(WorkerError, match="the model is of cheese"):
        carry_out(pool, [job(0)])


def test_workers_that_die_while_they_start_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "dying").touch()
    with (
        scripted_pool(tmp_path, count=1, retries=1) as pool,
        pytest.raises(WorkerError, match="keep dying while they start"),
    ):
        carry_out(pool, [job(0)])


def test_more_workers_than_fit_are_refused_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"workers\.count: 3 workers of 1 CPU .* has 2"):
        RayPool(scripted_spec(tmp_path), count=3, gpus_per_worker=0.0, timeout=9.0, retries=0)
    with pytest.raises(WorkerError, match=r"workers\.count: .* GPU .* has 0"):
        RayPool(scripted_spec(tmp_path), count=1, gpus_per_worker=1.0, timeout=9.0, retries=0)
    assert time.monotonic() - started < 5


def test_as_many_workers_as_cpus_and_memory_carry(tmp_path: Path) -> None:
    for max_count, expected in ((8, 2), (1, 1)):
        with scripted_pool(tmp_path, count=None, max_count=max_count) as pool:
            assert pool.size == expected


def test_jobs_under_way_are_abandoned_on_closing(tmp_path: Path) -> None:
    with scripted_pool(tmp_path) as pool:
        pool.submit(job(0, "hang"))
        pool.submit(job(1, "hang"))
        until = time.monotonic() + 30
        while not (pids(tmp_path, 0) and pids(tmp_path, 1)) and time.monotonic() < until:
            assert pool.next(0.2) is None
        processes = pids(tmp_path, 0) + pids(tmp_path, 1)
        assert len(processes) == 2
        assert all(map(is_alive, processes))
    assert wait_until_gone(processes) == []
