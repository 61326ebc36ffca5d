"""A machine of round speeds, and a small experiment to plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.plan.machine import Load
from evomerge.plan.records import Machine
from evomerge.prepare import PreparedRun, prepare
from tests.tasks import write_tasks

EXPERIMENT = """\
name: small
base_model: {zoo}/base
models: [{zoo}/one, {zoo}/two]
{search}
objectives:
  - {{task: choose, metric: acc}}
  - {{task: gen, metric: exact_match}}
evaluation: {{batch_size: 4, holdout: 0.4, include_path: [tasks], device: cpu}}
workers: {{backend: inline}}
"""

SEARCH = """\
search_space: {type: parameter, merge_method: ties,
  parameters: {weight: {low: 0, high: 1}, density: {low: 0.1, high: 0.9}}}
search: {algorithm: cma-es, evaluations: 14, population: 6}"""

Prepare = Callable[..., PreparedRun]

ROUND_MACHINE = Machine(prompt_flops=1e9, decode_flops=1e8, bytes_per_second=1e9, call_seconds=1e-6)


def measured(_: Load) -> Machine:
    return ROUND_MACHINE


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("small") / "tasks", count=10)


@pytest.fixture
def prepared(tiny_zoo: Path, task_folder: Path) -> Prepare:
    """Prepare an experiment over the tiny zoo."""

    def make(search: str = SEARCH, *overrides: Any) -> PreparedRun:
        file = task_folder.parent / "experiment.yml"
        file.write_text(EXPERIMENT.format(zoo=tiny_zoo, search=search))
        return prepare(file, overrides=overrides)

    return make
