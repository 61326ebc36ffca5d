"""Jobs, and the protocol of the pools that carry them out.

A pool is given jobs and returns outcomes, in whatever order they finish. It never raises for a candidate's
sake: what goes wrong with a job is the job's outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Measure
from evomerge.fitness.user_code import UserCode
from evomerge.recipe import Recipe
from evomerge.records import Outcome


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to score.

    Attributes:
        number: Identifies the job within its pool.
        documents: What to score it on.
        recipe: The merge to score, written into the worker's live model; or None for `checkpoint`.
        checkpoint: A checkpoint folder to load and score by itself.
    """

    number: int
    documents: tuple[DocumentSet, ...]
    recipe: Recipe | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a worker process needs to set itself up.

    Attributes:
        models: Model as recipes name it -> its local folder.
        donor: The model whose config, tokenizer and generation config the live model gets.
        tasks: lm-eval tasks to load.
        include_path: Folders with task files.
        metrics: Task as the objectives name it -> the (metric, filter) pairs wanted.
        evaluation: How to score.
        device: Torch device of the live model.
        threads: CPU threads.
        allow_task_code: Whether task files may run Python code.
        own: Measures of the user's own.
        code: The functions among them, where they may run.
        statistics: Folder with statistics of the sources, shared by the workers of a host, or None.
        memory_budget: Bytes of source tensors to keep on a device other than the CPU, or None for all.
    """

    models: Mapping[str, Path]
    donor: str
    tasks: tuple[str, ...]
    include_path: tuple[Path, ...]
    metrics: Mapping[str, tuple[tuple[str, str], ...]]
    evaluation: EvaluationSettings
    device: str
    threads: int
    allow_task_code: bool = False
    own: tuple[Measure, ...] = ()
    code: UserCode | None = None
    statistics: Path | None = None
    memory_budget: int | None = None


class WorkerPool(Protocol):
    """Carries out jobs."""

    @property
    def size(self) -> int:
        """Number of jobs that run at the same time."""
        ...

    @property
    def events(self) -> list[str]:
        """What happened to workers since last asked: deaths, replacements, retries; emptied by the reader."""
        ...

    def submit(self, job: Job) -> None:
        """Queue a job."""
        ...

    def next(self, timeout: float) -> tuple[int, Outcome] | None:
        """Wait for any job to finish.

        Args:
            timeout: Longest wait in seconds.

        Returns:
            The job's number and outcome, or None when none finished in time.

        Raises:
            WorkerError: No worker is left to run jobs on.
        """
        ...

    def close(self) -> None:
        """Stop all workers; jobs under way are abandoned."""
        ...
