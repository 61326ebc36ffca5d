"""Workers over the tiny zoo, and one local Ray for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.experiment import EvaluationSettings
from evomerge.workers.base import WorkerSpec
from tests.tasks import write_tasks


@pytest.fixture(scope="session")
def spec(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    tasks = write_tasks(tmp_path_factory.mktemp("tasks"))
    return WorkerSpec(
        models={name: tiny_zoo / name for name in ("base", "one", "two")},
        donor="base",
        tasks=("gen", "choose"),
        include_path=(tasks,),
        metrics={"gen": (("exact_match", "first"),), "choose": (("acc", "none"), ("acc_norm", "none"))},
        evaluation=EvaluationSettings(batch_size=4),
        device="cpu",
        threads=1,
    )


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Two CPUs."""
    import ray

    from evomerge.workers.ray_pool import _start_ray

    _start_ray(ray, num_cpus=2)
    yield
    ray.shutdown()
