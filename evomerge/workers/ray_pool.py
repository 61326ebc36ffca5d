"""A pool of Ray actors: the only module that imports ray.

Each actor holds one worker and is fed one job at a time. Ray's own retries are off, because they would
replay a job that crashes its worker without end; this pool requeues a bounded number of times itself and
replaces dead or hanging actors.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from evomerge.errors import WorkerError
from evomerge.records import Outcome, Status
from evomerge.workers.base import Job, WorkerSpec
from evomerge.workers.worker import Worker

START_TIMEOUT = 600.0
"""Seconds a new actor may take to load its models."""


RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # A worker's threads are set by the worker; without this Ray warns about GPUs it hides on CPU workers.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set before ray is first imported, which is when it reads them."""


@dataclass(kw_only=True)
class _Slot:
    """One actor and what it is doing: starting (`job` None, `ref` set), working, or idle (`ref` None)."""

    actor: Any
    ref: Any
    job: Job | None
    deadline: float
    num_failed_starts: int = 0


class RayPool:
    """Scores jobs on Ray actors.

    Args:
        spec: What each worker holds.
        count: Number of workers; None for as many as the cluster's CPUs and GPUs carry.
        max_count: Most workers when `count` is None, for the memory's sake.
        gpus_per_worker: GPUs each worker asks Ray for.
        timeout: Longest time for one job in seconds.
        retries: How often a job is dispatched again after its worker died or timed out.
        make_worker: Builds the worker inside its process.

    Raises:
        WorkerError: Ray cannot be started, or the cluster is too small.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        count: int | None,
        max_count: int = 1,
        gpus_per_worker: float,
        timeout: float,
        retries: int,
        make_worker: Callable[[WorkerSpec], Any] = Worker,
    ) -> None:
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        self._ray = ray
        self._spec = spec
        self._gpus = gpus_per_worker
        self._timeout = timeout
        self._retries = retries
        self._make_worker = make_worker
        self._queue: deque[Job] = deque()
        self._attempts: dict[int, int] = {}
        self._failed: deque[tuple[int, Outcome]] = deque()
        self._events: list[str] = []
        self._slots: list[_Slot] = []
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(ray, num_cpus=max((count or 1) * spec.threads, os.cpu_count() or 1))
        try:
            if count is None:
                count = max(1, min(max_count, self._most_workers()))
            self._check_resources(count)
            self._slots += [self._start() for _ in range(count)]
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Number of actors."""
        return len(self._slots)

    @property
    def events(self) -> list[str]:
        """Deaths, replacements and retries since last asked."""
        events, self._events = self._events, []
        return events

    def pids(self) -> list[int]:
        """Process ids of the workers that are up, for tests and for people with a debugger."""
        return [self._ray.get(slot.actor.pid.remote()) for slot in self._slots if slot.ref is None]

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.append(job)
        self._feed()

    def next(self, timeout: float) -> tuple[int, Outcome] | None:
        """Wait for any job to finish; see `WorkerPool.next`."""
        until = time.monotonic() + timeout
        while True:
            if self._failed:
                return self._failed.popleft()
            self._feed()
            busy = {slot.ref: slot for slot in self._slots if slot.ref is not None}
            if not busy:
                return None
            now = time.monotonic()
            wait = max(0.0, min(until, *(slot.deadline for slot in busy.values())) - now)
            ready, _ = self._ray.wait(list(busy), timeout=wait)
            if ready:
                finished = self._collect(busy[ready[0]])
                if finished is not None:
                    return finished
            now = time.monotonic()
            for slot in busy.values():
                if slot.ref is not None and slot.ref not in ready and now >= slot.deadline:
                    limit = START_TIMEOUT if slot.job is None else self._timeout
                    self._give_up(slot, f"no answer within {limit:g} s", timed_out=True)
            if now >= until and not self._failed:
                return None

    def close(self) -> None:
        """Kill the actors, and Ray if this pool started it."""
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots = []
        if self._owns_ray:
            self._ray.shutdown()
            self._owns_ray = False

    def _start(self, num_failed_starts: int = 0) -> _Slot:
        actor_class = self._ray.remote(
            num_cpus=self._spec.threads, num_gpus=self._gpus, max_restarts=0, max_task_retries=0
        )(_Actor)
        actor = actor_class.remote()
        return _Slot(
            actor=actor,
            ref=actor.start.remote(self._spec, self._make_worker),
            job=None,
            deadline=time.monotonic() + START_TIMEOUT,
            num_failed_starts=num_failed_starts,
        )

    def _feed(self) -> None:
        for slot in self._slots:
            if slot.ref is None and self._queue:
                job = self._queue.popleft()
                self._attempts[job.number] = self._attempts.get(job.number, 0) + 1
                slot.job = job
                slot.ref = slot.actor.run.remote(job)
                slot.deadline = time.monotonic() + self._timeout

    def _collect(self, slot: _Slot) -> tuple[int, Outcome] | None:
        """Take the answer of a slot that Ray reports ready; a failed reference counts as ready too."""
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = self._ray.get(slot.ref)
        except RayTaskError as error:
            if slot.job is None:
                raise WorkerError(f"a worker cannot be set up: {error.cause or error}") from error
            self._give_up(slot, f"{type(error.cause).__name__}: {error.cause}")
            return None
        except RayError as error:
            self._give_up(slot, f"its worker died ({type(error).__name__})")
            return None
        job, slot.ref, slot.job, slot.num_failed_starts = slot.job, None, None, 0
        if job is None:
            return None
        outcome: Outcome = answer
        if outcome.status is Status.FAILED:
            # The process may be short of memory or otherwise unsound, so the next job gets a fresh one.
            slot.job = job
            self._give_up(slot, outcome.reason)
            return None
        return job.number, replace(outcome, attempts=self._attempts.pop(job.number))

    def _give_up(self, slot: _Slot, reason: str, *, timed_out: bool = False) -> None:
        """Replace a slot's actor and requeue its job, or report the job failed once its retries are spent."""
        job, slot.job = slot.job, None
        if job is None:
            slot.num_failed_starts += 1
            if slot.num_failed_starts > self._retries:
                raise WorkerError(f"workers keep dying while they start: {reason}")
        else:
            attempts = self._attempts[job.number]
            if attempts <= self._retries:
                self._events.append(f"job {job.number} is tried again: {reason}")
                self._queue.appendleft(job)
            else:
                del self._attempts[job.number]
                reason = f"{reason}; given up after {attempts} attempts"
                status = Status.FAILED
                outcome = Outcome(status=status, reason=reason, attempts=attempts)
                self._failed.append((job.number, outcome))
        if timed_out:
            self._events.append("a worker hangs and is killed")
        self._replace(slot)

    def _replace(self, slot: _Slot) -> None:
        self._ray.kill(slot.actor)
        fresh = self._start(slot.num_failed_starts)
        slot.actor, slot.ref, slot.job, slot.deadline = fresh.actor, fresh.ref, None, fresh.deadline

    def _most_workers(self) -> int:
        """How many workers the cluster's CPUs and GPUs carry."""
        available = self._ray.cluster_resources()
        most = available.get("CPU", 0.0) // self._spec.threads
        return int(min(most, available.get("GPU", 0.0) // self._gpus) if self._gpus else most)

    def _check_resources(self, count: int) -> None:
        """Ray lets an actor that fits nowhere wait for ever; say so instead."""
        available = self._ray.cluster_resources()
        for name, each in (("CPU", float(self._spec.threads)), ("GPU", self._gpus)):
            if each * count > available.get(name, 0.0) + 1e-9:
                raise WorkerError(
                    f"workers.count: {count} workers of {each:g} {name} each need {each * count:g} {name}, "
                    f"the Ray cluster has {available.get(name, 0.0):g}; ask for fewer"
                )


class _Actor:
    """The process around one worker."""

    def start(self, spec: WorkerSpec, make_worker: Callable[[WorkerSpec], Any]) -> None:
        """Build the worker; not in `__init__`, whose errors Ray reports without their cause."""
        # Models and data were resolved before the search; both libraries read this when first imported.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        self._worker = make_worker(spec)

    def pid(self) -> int:
        """The process's id."""
        return os.getpid()

    def run(self, job: Job) -> Outcome:
        """Score a job."""
        outcome: Outcome = self._worker.run(job)
        return outcome


def _start_ray(ray: Any, *, num_cpus: int) -> None:
    """Join the cluster that `RAY_ADDRESS` names, or start a local one that listens to this machine only."""
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = (
        {"address": address}
        if address
        else {
            "num_cpus": num_cpus,
            "include_dashboard": False,
        }
    )
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise WorkerError(f"cannot reach {where}: {error}") from error
    finally:
        # Ray installs a handler of its own, which would exit where the run has to stop in order.
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
