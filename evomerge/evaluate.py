"""Scoring one model outside a run, with the run's own evaluator."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, resolve
from evomerge.errors import ConfigurationError, EvomergeError
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.context import check_context
from evomerge.fitness.documents import split_documents
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.objectives import column_error
from evomerge.merge.export import export_model
from evomerge.merge.load import load_recipe
from evomerge.prepare import torch_device
from evomerge.records import Status
from evomerge.workers.base import Job, WorkerSpec
from evomerge.workers.worker import Worker


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: Sequence[Path] = (),
    settings: EvaluationSettings | None = None,
    allow_task_code: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint, or a recipe, which is merged into a temporary checkpoint first.

    Args:
        model: `id-or-path[@revision][+adapter]`, or a recipe file ending in .yml or .yaml.
        tasks: lm-eval tasks.
        include_path: Folders with task files.
        settings: How to score.
        allow_task_code: Whether task files outside lm-eval may run Python code.

    Returns:
        Plain values: per task its metrics, their standard errors and the number of documents.

    Raises:
        ConfigurationError: The model or a task cannot be used.
        EvomergeError: The model cannot be scored.
    """
    settings = settings or EvaluationSettings()
    if not tasks:
        raise ConfigurationError("--tasks: expected at least one task")
    folders = tuple(path.resolve() for path in include_path)
    if settings.data_dir is not None:
        data_dir = str(Path(settings.data_dir).expanduser().resolve())
        settings = settings.model_copy(update={"data_dir": data_dir})
    library = TaskLibrary(tasks, folders, allow_code=allow_task_code, data_dir=settings.data_dir)
    documents = []
    for name in tasks:
        count = library.num_documents(name)
        ids, _ = split_documents(library.split_name(name), count, holdout=0.0, limit=settings.limit)
        documents.append(DocumentSet(task=name, doc_ids=ids, name=name, complete=len(ids) == count))
    with tempfile.TemporaryDirectory(prefix="evomerge-") as scratch:
        if model.endswith((".yml", ".yaml")):
            loaded = load_recipe(Path(model))
            folder = Path(scratch) / "model"
            export_model(loaded.recipe, loaded.checkpoints, folder)
        else:
            try:
                folder = resolve(ModelReference.parse(model))
            except ValueError as error:
                raise ConfigurationError(f"{model}: {error}") from None
            Checkpoint.open(folder)
        spec = WorkerSpec(
            models={"model": folder},
            donor="model",
            tasks=tuple(tasks),
            include_path=folders,
            metrics={name: tuple(library.metrics(name)) for name in tasks},
            evaluation=settings,
            device=torch_device(settings.device),
            threads=1,
            allow_task_code=allow_task_code,
        )
        check_context(documents, library, spec.metrics, settings, spec.models)
        outcome = Worker(spec).run(Job(number=0, documents=tuple(documents), checkpoint=folder))
    if outcome.status is not Status.OK:
        raise EvomergeError(f"{model}: cannot be scored: {outcome.reason}")
    return {
        "model": model,
        "tasks": {
            name: {
                "metrics": dict(outcome.metrics[name]),
                "standard_errors": {metric: column_error(values) for metric, values in scores.values.items()},
                "num_documents": len(scores.doc_ids),
            }
            for name, scores in outcome.samples.items()
        },
        "counts": dict(outcome.counts),
        "seconds": dict(outcome.seconds),
    }
