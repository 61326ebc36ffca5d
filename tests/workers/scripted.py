"""Workers that do what the job's task name says; importable by Ray's processes, without torch."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.records import Outcome, Status
from evomerge.workers.base import Job, WorkerSpec


def scripted_spec(folder: Path) -> WorkerSpec:
    """A specification whose `include_path` is where scripted workers leave their marks."""
    return WorkerSpec(
        models={},
        donor="",
        tasks=(),
        include_path=(folder,),
        metrics={},
        evaluation=EvaluationSettings(),
        device="cpu",
        threads=1,
    )


def job(number: int, *words: str) -> Job:
    """A job that does what the words say, one word per attempt, the last one from then on."""
    documents = tuple(DocumentSet(task=word, doc_ids=(0,), name=word) for word in words or ("score",))
    return Job(number=number, documents=documents)


class ScriptedWorker:
    """Marks every attempt with a file `<job>.<attempt>` that holds its process id."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._folder = spec.include_path[0]
        if (self._folder / "broken").exists():
            raise ValueError("the model is of cheese")
        if (self._folder / "dying").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, job: Job) -> Outcome:
        attempt = len(list(self._folder.glob(f"{job.number}.*")))
        (self._folder / f"{job.number}.{attempt}").write_text(str(os.getpid()))
        word = job.documents[min(attempt, len(job.documents) - 1)].task
        outcome = Outcome(status=Status.OK, metrics={"t": {"m": job.number / 7}})
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "hang":
            time.sleep(1000)
        elif word == "slow":
            time.sleep(0.4)
        elif word == "memory":
            outcome = Outcome(status=Status.FAILED, reason="MemoryError: too much")
        elif word == "unavailable":
            outcome = Outcome(status=Status.UNAVAILABLE, reason="the judge is away")
        elif word == "raise":
            raise RuntimeError("a bug")
        elif word == "offline":
            counts = {name: int(os.environ[name]) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
            outcome = replace(outcome, counts=counts)
        return outcome


def pids(folder: Path, number: int) -> list[int]:
    """Processes that attempted a job, in order."""
    return [int(path.read_text()) for path in sorted(folder.glob(f"{number}.*"))]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: list[int], *, seconds: float = 20) -> list[int]:
    """The processes that are still alive after some time."""
    until = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left
