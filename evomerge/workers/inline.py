"""A pool of one worker inside the controller's own process, for debugging and tests."""

from __future__ import annotations

from collections import deque

from evomerge.records import Outcome
from evomerge.workers.base import Job
from evomerge.workers.worker import Worker


class InlinePool:
    """Runs each job when the next outcome is asked for; timeouts and retries do not apply.

    Args:
        worker: The worker that runs the jobs.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._queue: deque[Job] = deque()

    @property
    def size(self) -> int:
        """One job at a time."""
        return 1

    @property
    def events(self) -> list[str]:
        """Nothing happens to a worker that lives and dies with the controller."""
        return []

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.append(job)

    def next(self, timeout: float) -> tuple[int, Outcome] | None:  # noqa: ARG002
        """Run the oldest job."""
        if not self._queue:
            return None
        job = self._queue.popleft()
        return job.number, self._worker.run(job)

    def close(self) -> None:
        """Forget the queue."""
        self._queue.clear()
