"""Worker pools and how many workers a machine carries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from evomerge.experiment import WorkerSettings
from evomerge.records import Outcome
from evomerge.workers.base import Job, WorkerPool, WorkerSpec

PROCESS_BYTES = 10**9
"""Memory of a worker process before it holds any model: Python, torch, transformers, lm-eval and Ray."""


def build_pool(spec: WorkerSpec, settings: WorkerSettings, *, worker_bytes: int) -> WorkerPool:
    """Start the pool that the experiment asks for.

    Args:
        spec: What each worker holds.
        settings: Backend, number and limits of the workers.
        worker_bytes: Memory one worker needs for its live model and for merging.

    Raises:
        WorkerError: The workers cannot be started.
    """
    if settings.backend == "inline":
        from evomerge.workers.inline import InlinePool
        from evomerge.workers.worker import Worker

        return InlinePool(Worker(spec))
    from evomerge.workers.ray_pool import RayPool

    on_gpu = spec.device.startswith("cuda")
    gpus = settings.gpus_per_worker
    return RayPool(
        spec,
        count=None if settings.count == "auto" else settings.count,
        max_count=max(1, available_memory() // (PROCESS_BYTES + worker_bytes)),
        gpus_per_worker=(1.0 if on_gpu else 0.0) if gpus == "auto" else gpus,
        timeout=settings.timeout,
        retries=settings.retries,
    )


class DeferredPool:
    """Starts its pool when the first job comes.

    Args:
        start: Starts it.
    """

    def __init__(self, start: Callable[[], WorkerPool]) -> None:
        self._start = start
        self._pool: WorkerPool | None = None

    @property
    def size(self) -> int:
        """Jobs that run at the same time; 0 before the first came."""
        return 0 if self._pool is None else self._pool.size

    @property
    def events(self) -> list[str]:
        """What happened to workers."""
        return [] if self._pool is None else self._pool.events

    def submit(self, job: Job) -> None:
        """Queue a job, after starting the pool if it is the first."""
        if self._pool is None:
            self._pool = self._start()
        self._pool.submit(job)

    def next(self, timeout: float) -> tuple[int, Outcome] | None:
        """Wait for any job to finish."""
        return None if self._pool is None else self._pool.next(timeout)

    def close(self) -> None:
        """Stop the pool if it was started."""
        if self._pool is not None:
            self._pool.close()


def worker_memory(tensor_sizes: Iterable[int], *, itemsize: float, num_models: int) -> int:
    """Bytes one worker needs at most.

    That is its live model, and beside it either float32 copies of the largest tensor of every model while it
    merges with a method that has no kernel, or another model while it scores a checkpoint. The sources
    themselves are memory-mapped and shared between the workers of a host.

    Args:
        tensor_sizes: Number of elements of every tensor.
        itemsize: Bytes per element of the live model, on average.
        num_models: Models merged at once, the base counted.
    """
    sizes = list(tensor_sizes)
    model = round(sum(sizes) * itemsize)
    working = max(sizes, default=0) * 4 * (2 * num_models + 3)
    return model + max(model, working)


def available_memory() -> int:
    """Bytes of memory that can be taken now."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


__all__ = ["DeferredPool", "WorkerPool", "WorkerSpec", "build_pool", "worker_memory"]
