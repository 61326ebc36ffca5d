"""Scoring one model outside a run, with the run's own evaluator."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, resolve
from evomerge.errors import ConfigurationError, EvomergeError, TaskError
from evomerge.experiment import EvaluationSettings, ObjectiveSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.context import check_context
from evomerge.fitness.documents import split_documents
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.objectives import Measure, column_error
from evomerge.fitness.user_code import UserCode, survey
from evomerge.measure_settings import FUNCTION
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
    fitness: Sequence[str] = (),
    given: Literal["generations", "model"] = "generations",
    allow_task_code: bool = False,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint, or a recipe, which is merged into a temporary checkpoint first.

    Args:
        model: `id-or-path[@revision][+adapter]`, or a recipe file ending in .yml or .yaml.
        tasks: lm-eval tasks.
        include_path: Folders with task files.
        settings: How to score.
        fitness: Functions of the user's, `package.module:function`, to score every task by as well; modules are
            looked for in the working directory, then on Python's import path.
        given: What they are called with.
        allow_task_code: Whether task files outside lm-eval may run Python code.
        allow_code: Whether they may, and the functions.

    Returns:
        Plain values: per task its metrics, their standard errors and the number of documents.

    Raises:
        ConfigurationError: The model or a task cannot be used.
        EvomergeError: The model cannot be scored.
    """
    settings = settings or EvaluationSettings()
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise ConfigurationError("--tasks: expected at least one task")
    folders = tuple(path.resolve() for path in include_path)
    if settings.data_dir is not None:
        data_dir = str(Path(settings.data_dir).expanduser().resolve())
        settings = settings.model_copy(update={"data_dir": data_dir})
    code = _user_code(fitness, allow_code=allow_code)
    library = TaskLibrary(
        tasks, folders, allow_code=allow_task_code or allow_code, data_dir=settings.data_dir
    )
    own = tuple(
        library.measure(name, ObjectiveSettings(task=name, fitness=function, given=given), "--fitness")
        for name in tasks
        for function in fitness
    )
    documents = []
    for name in tasks:
        count = library.num_documents(name)
        ids, _ = split_documents(library.split_name(name), count, holdout=0.0, limit=settings.limit)
        documents.append(DocumentSet(task=name, doc_ids=ids, name=name, complete=len(ids) == count))
    with tempfile.TemporaryDirectory(prefix="evomerge-") as scratch:
        folder = _checkpoint(model, Path(scratch))
        spec = WorkerSpec(
            models={"model": folder},
            donor="model",
            tasks=tuple(tasks),
            include_path=folders,
            metrics={name: _metrics(library, name, own) for name in tasks},
            evaluation=settings,
            device=torch_device(settings.device),
            threads=1,
            allow_task_code=allow_task_code or allow_code,
            own=own,
            code=code,
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


def _checkpoint(model: str, scratch: Path) -> Path:
    """The folder of a model, or of what a recipe makes.

    Raises:
        ConfigurationError: It is no model.
    """
    if model.endswith((".yml", ".yaml")):
        loaded = load_recipe(Path(model))
        folder = scratch / "model"
        export_model(loaded.recipe, loaded.checkpoints, folder)
        return folder
    try:
        folder = resolve(ModelReference.parse(model))
    except ValueError as error:
        raise ConfigurationError(f"{model}: {error}") from None
    Checkpoint.open(folder)
    return folder


def _metrics(library: TaskLibrary, task: str, own: Sequence[Measure]) -> tuple[tuple[str, str], ...]:
    """The (metric, filter) pairs that a task is scored by, the user's own among them.

    Raises:
        TaskError: There is none.
    """
    found = tuple((item.metric, item.filter) for item in own if item.task == task)
    try:
        return (*library.metrics(task), *found)
    except TaskError:
        if found:
            return found
        raise


def _user_code(functions: Sequence[str], *, allow_code: bool) -> UserCode | None:
    """What functions are made of, if they may run.

    Raises:
        ConfigurationError: They may not, or are not there.
    """
    if not functions:
        return None
    for name in functions:
        if not FUNCTION.fullmatch(name):
            raise ConfigurationError(f"--fitness {name}: expected module:function, such as my_fitness:score")
    try:
        code = survey(functions, Path.cwd())
    except ConfigurationError as error:
        raise ConfigurationError(f"--fitness: {error}") from None
    if not allow_code:
        raise ConfigurationError(
            f"--fitness: {', '.join(code.hashes)} is Python code that would be run; read it, and pass --allow-code "
            "if you trust it"
        )
    return code
