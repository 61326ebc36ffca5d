"""Worker pools and how many workers a machine carries."""

from __future__ import annotations

import os
from collections.abc import Iterable

from evomerge.experiment import WorkerSettings
from evomerge.workers.base import WorkerPool, WorkerSpec

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


def worker_memory(tensor_sizes: Iterable[int], *, itemsize: int, num_models: int) -> int:
    """Bytes one worker needs: the live model, and float32 copies of the largest tensor of every model.

    The sources themselves are memory-mapped and shared between the workers of a host.

    Args:
        tensor_sizes: Number of elements of every tensor.
        itemsize: Bytes per element of the live model.
        num_models: Models merged at once, the base counted.
    """
    sizes = list(tensor_sizes)
    working = max(sizes, default=0) * 4 * (2 * num_models + 3)
    return sum(sizes) * itemsize + working


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


__all__ = ["WorkerPool", "WorkerSpec", "build_pool", "worker_memory"]
