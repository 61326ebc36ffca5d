"""The checks of an experiment, each independent of the others, so that all faults are found at once.

Every fault is put where the experiment file says what is wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, resolve
from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.experiment import Experiment, SearchSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint, as_settings, resolve_constraints
from evomerge.fitness.context import check_context
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.metrics import LIKELIHOOD
from evomerge.fitness.objectives import Objective
from evomerge.merge.compatible import check_compatible
from evomerge.search import SEARCHERS, SearcherOptions
from evomerge.workers.base import WorkerSpec
from evomerge.yaml_file import Document, FieldPath, read_single, validate


class Checks:
    """Collects the faults of independent checks, each at its place in the experiment file."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[Fault] = []

    @contextlib.contextmanager
    def collect(self, *places: FieldPath) -> Iterator[None]:
        """Note the faults raised inside; those without a line of their own are put at the given place."""
        try:
            yield
        except ConfigurationError as error:
            for fault in error.faults:
                if fault.line is None and places:
                    fault = self.document.fault(places[0], str(fault))
                elif fault.file is None and fault.path:
                    place = tuple(int(part) if part.isdigit() else part for part in fault.path.split("."))
                    if place[0] in self.document.data:
                        fault = self.document.fault(place, fault.reason)
                self.faults.append(fault)

    def stop_if_faulty(self) -> None:
        """Raise all faults noted so far.

        Raises:
            ConfigurationError: Carries them.
        """
        if self.faults:
            raise ConfigurationError(self.faults)

    def models(self, experiment: Experiment, folder: Path) -> dict[str, Checkpoint]:
        """Open every model and hold them against each other."""
        found: dict[str, Checkpoint] = {}
        places: dict[str, FieldPath] = {text: ("models", i) for i, text in enumerate(experiment.models)}
        if experiment.base_model is not None:
            places.setdefault(experiment.base_model, ("base_model",))
        for text, place in places.items():
            with self.collect(place):
                try:
                    reference = ModelReference.parse(text)
                except ValueError as error:
                    raise ConfigurationError(str(error)) from None
                found[text] = Checkpoint.open(resolve(reference, roots=[folder]))
        return found

    def compatible(
        self, experiment: Experiment, checkpoints: Mapping[str, Checkpoint], *, movable: bool
    ) -> None:
        """Hold every model against the one that gives config and tokenizer.

        Args:
            experiment: The experiment.
            checkpoints: Model as the experiment names it -> its checkpoint.
            movable: Whether layers are only put in another order, never merged.
        """
        donor = experiment.base_model or experiment.models[0]
        if donor not in checkpoints:
            return
        for text, checkpoint in checkpoints.items():
            place = (
                ("models", experiment.models.index(text)) if text in experiment.models else ("base_model",)
            )
            with self.collect(place):
                check_compatible(checkpoint, checkpoints[donor], donor, movable=movable)

    def _space(self, space: str | dict[str, Any], place: FieldPath, folder: Path) -> Document:
        """A search space's YAML, from its file or from the experiment itself."""
        if isinstance(space, str):
            document = Document(data={})
            with self.collect(place):
                document = read_single(absolute_path(space, folder))
            return document  # noqa: RET504 - `collect` swallows faults
        depth = len(place)
        lines = {path[depth:]: line for path, line in self.document.lines.items() if path[:depth] == place}
        return Document(data=space, file=self.document.file, lines=lines, prefix=place)

    def options(self, experiment: Experiment) -> list[SearcherOptions]:
        """The options of every search's algorithm."""
        found = []
        for number, settings in enumerate(experiment.searches):
            with self.collect():
                found.append(_searcher_options(settings.search, self.document, experiment.place(number)))
        return found

    def spaces(self, experiment: Experiment, folder: Path) -> list[Document]:
        """The YAML of every search's space."""
        return [
            self._space(settings.search_space, (*experiment.place(number), "search_space"), folder)
            for number, settings in enumerate(experiment.searches)
        ]

    def tasks(
        self,
        experiment: Experiment,
        include_path: tuple[Path, ...],
        data_dir: str | None,
        *,
        allow_code: bool,
    ) -> tuple[TaskLibrary, tuple[Objective, ...], tuple[Constraint, ...]]:
        """Load the tasks and look up the metrics."""
        loaded: list[TaskLibrary] = []
        with self._collect_at(_task_places(experiment)) as places:
            loaded.append(TaskLibrary(list(places), include_path, allow_code=allow_code, data_dir=data_dir))
        if not loaded:
            return None, (), ()  # type: ignore[return-value]  # the caller stops at the faults
        library = loaded[0]
        objectives: list[Objective] = []
        for index, settings in enumerate(experiment.objectives):
            with self.collect():
                objectives.append(library.objective(settings, index))
                if settings.holdout_task is not None:
                    filled = settings.model_copy(update={"filter": objectives[-1].filter})
                    library.measure(settings.holdout_task, filled, f"objectives.{index}")
                if experiment.evaluation.screen is not None:
                    library.check_references(settings.task, "evaluation.screen.metric")
        constraints: tuple[Constraint, ...] = ()
        if not self.faults:
            with self.collect():
                constraints = resolve_constraints(experiment.constraints, objectives, library.measure)
                self._held_out(experiment, constraints, library)
        return library, tuple(objectives), constraints

    @contextlib.contextmanager
    def _collect_at(self, places: Mapping[str, FieldPath]) -> Iterator[Mapping[str, FieldPath]]:
        """Note the faults of tasks raised inside, each where the experiment names the task."""
        try:
            yield places
        except ConfigurationError as error:
            for fault in error.faults:
                place = places.get(fault.path, tuple(fault.path.split(".")))
                self.faults.append(self.document.fault(place, fault.reason))

    def context(
        self,
        experiment: Experiment,
        documents: Sequence[DocumentSet],
        library: TaskLibrary,
        spec: WorkerSpec,
    ) -> None:
        """Make sure that every document fits the context of every model, which are scored one by one at the end."""
        screened = (
            {item.task for item in experiment.objectives} if spec.evaluation.screen is not None else set()
        )
        metrics = {
            name: (*pairs, LIKELIHOOD) if name in screened else pairs for name, pairs in spec.metrics.items()
        }
        with self._collect_at(_task_places(experiment)):
            check_context(documents, library, metrics, spec.evaluation, spec.models)

    def _held_out(
        self, experiment: Experiment, constraints: Sequence[Constraint], library: TaskLibrary
    ) -> None:
        """Make sure that the holdout task of an objective has what constrains the objective's task."""
        others = {item.task: item.holdout_task for item in experiment.objectives if item.holdout_task}
        for item in constraints:
            if item.task in others:
                library.measure(others[item.task], as_settings(item), "constraints")


def _task_places(experiment: Experiment) -> dict[str, FieldPath]:
    """Every task -> where the experiment names it first."""
    places: dict[str, FieldPath] = {}
    for index, objective in enumerate(experiment.objectives):
        places.setdefault(objective.task, ("objectives", index, "task"))
        if objective.holdout_task is not None:
            places.setdefault(objective.holdout_task, ("objectives", index, "holdout_task"))
    for index, entry in enumerate(experiment.constraints):
        if entry.task is not None:
            places.setdefault(entry.task, ("constraints", index, "task"))
    return places


def _searcher_options(search: SearchSettings, document: Document, place: FieldPath) -> SearcherOptions:
    spec = SEARCHERS.get(search.algorithm)
    if spec is None:
        known = ", ".join(sorted(SEARCHERS))
        reason = f"expected one of {known}, got {search.algorithm!r}{nearest(search.algorithm, SEARCHERS)}"
        raise ConfigurationError(document.fault((*place, "search", "algorithm"), reason))
    nested: Any = search.options
    for part in reversed((*place, "search")):
        nested = {part: nested}
    return validate(spec.options, replace(document, data=nested), at=(*place, "search"))


def absolute_path(text: str, folder: Path) -> Path:
    """A path that is relative to a folder."""
    return Path(os.path.abspath(folder / Path(text).expanduser()))  # noqa: PTH100 - keeps symlinks
