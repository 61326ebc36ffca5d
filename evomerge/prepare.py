"""From an experiment file to everything a run needs, with every fault found before a model is loaded.

Only headers of weight files, configs, tokenizers and task files are read here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, absolute, resolve
from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.experiment import Experiment, SearchSettings, read_experiment
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint, as_settings, resolve_constraints
from evomerge.fitness.context import check_context
from evomerge.fitness.documents import choose_documents
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.metrics import LIKELIHOOD
from evomerge.fitness.objectives import Objective
from evomerge.fitness.user_code import UserCode
from evomerge.merge.anatomy import anatomy_of
from evomerge.merge.check import check_recipe
from evomerge.merge.compatible import check_compatible, differing_keys
from evomerge.merge.plan import TORCH_DTYPES, plan_merge
from evomerge.own_code import code_folder, refuse_code, survey_code, warnings_of_own
from evomerge.search import SEARCHERS, SearcherOptions, build_searcher
from evomerge.spaces import SPACES, SourceModels, build_space, chooses_layers, needs_anatomies
from evomerge.spaces.limits import size_of
from evomerge.stages import Stage
from evomerge.workers.base import WorkerSpec
from evomerge.yaml_file import Document, FieldPath, read_single, validate


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Everything a run needs, checked.

    Attributes:
        experiment: The experiment with everything it left open filled in: absolute paths, the search space,
            filters and directions.
        stages: Its searches.
        objectives: What to optimise.
        constraints: What a candidate must hold to win.
        search_documents: Documents that candidates are scored on.
        holdout_documents: Documents that judge the result; empty when none were kept.
        checkpoints: Model as recipes name it -> its checkpoint. The winner of a stage, which later stages merge,
            is here once that stage is over; see `with_winner`.
        base: The base model as recipes name it, or None.
        sources: The source models as recipes name them.
        library: The loaded tasks.
        spec: What each worker needs.
        code: The user's own functions, whether they may run or not; None if there are none.
        warnings: What is unusual but not wrong.
    """

    experiment: Experiment
    stages: tuple[Stage, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    search_documents: tuple[DocumentSet, ...]
    holdout_documents: tuple[DocumentSet, ...]
    checkpoints: Mapping[str, Checkpoint]
    base: str | None
    sources: tuple[str, ...]
    library: TaskLibrary
    spec: WorkerSpec
    code: UserCode | None
    warnings: tuple[str, ...]

    @cached_property
    def inputs(self) -> Mapping[str, str]:
        """Model, task or code -> hash of its content; finding it reads all bytes of models it is not known of."""
        code = (
            {} if self.code is None else {f"code {name}": value for name, value in self.code.hashes.items()}
        )
        models = {f"model {name}": model.content_hash()[:16] for name, model in self.checkpoints.items()}
        tasks = {f"task {name}": self.library.fingerprint(name) for name in self.spec.tasks}
        return models | tasks | code

    def with_winner(self, stage: Stage, folder: Path) -> PreparedRun:
        """The same with the winner of a stage among the models.

        Args:
            stage: The stage.
            folder: The checkpoint of its winner.
        """
        return replace(
            self,
            checkpoints={**self.checkpoints, stage.name: Checkpoint.open(folder)},
            spec=replace(self.spec, models={**self.spec.models, stage.name: folder}),
        )


def prepare(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    allow_task_code: bool = False,
    allow_code: bool = False,
    starts: bool = False,
) -> PreparedRun:
    """Read an experiment file and check everything it names; functions of the user's are found, not run.

    Args:
        path: The experiment file.
        overrides: `path=value` texts; see `read_experiment`.
        allow_task_code: Whether task files outside lm-eval may run Python code.
        allow_code: Whether they may, and workers may run functions of the user's.
        starts: Whether a run starts with it, so that functions that may not run are refused, before anything else.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    experiment, document = read_experiment(path, overrides)
    folder = path.resolve().parent
    if starts and not allow_code:
        refuse_code(experiment, document, folder)
    checks = _Checks(document)
    checkpoints = checks.models(experiment, folder)
    spaces = checks.spaces(experiment, folder)
    checks.compatible(experiment, checkpoints, movable=all(map(_moves_layers, spaces)))
    options = checks.options(experiment)
    include_path = tuple(_absolute(text, folder) for text in experiment.evaluation.include_path)
    data_dir = experiment.evaluation.data_dir
    if data_dir is not None:
        data_dir = str(_absolute(data_dir, folder))
    code = None
    with checks.collect():
        code = survey_code(experiment, document, folder)
    tasks = checks.tasks(experiment, include_path, data_dir, allow_code=allow_task_code or allow_code)
    checks.stop_if_faulty()

    names = {text: _recipe_name(text, folder) for text in experiment.all_models}
    by_name = {names[text]: checkpoint for text, checkpoint in checkpoints.items()}
    base = names[experiment.base_model] if experiment.base_model is not None else None
    sources = tuple(names[text] for text in experiment.models)
    donor = base or sources[0]
    spaces = [_rename_models(space, names) for space in spaces]
    experiment = experiment.model_copy(
        update={
            "stages": [
                stage.model_copy(update={"models": stage.models and [names[text] for text in stage.models]})
                for stage in experiment.stages
            ]
        }
    )
    stages: tuple[Stage, ...] = ()
    with checks.collect():
        stages = _stages(experiment, spaces, options, by_name, sources, base)
    checks.stop_if_faulty()
    library, objectives, constraints = tasks
    search_documents, holdout_documents = choose_documents(experiment, constraints, library)
    resolved = experiment.model_copy(
        update={
            "models": list(sources),
            "base_model": base,
            **_resolved_spaces(experiment, [space.data for space in spaces]),
            "objectives": [
                settings.model_copy(
                    update={
                        "filter": objective.filter,
                        "direction": "maximize" if objective.maximize else "minimize",
                    }
                )
                for settings, objective in zip(experiment.objectives, objectives, strict=True)
            ],
            "constraints": [as_settings(constraint) for constraint in constraints],
            "evaluation": experiment.evaluation.model_copy(
                update={
                    "include_path": [str(folder) for folder in include_path],
                    "data_dir": data_dir,
                    "code_path": None if code is None else str(code_folder(experiment, folder)),
                }
            ),
        }
    )
    task_names = tuple(dict.fromkeys(item.task for item in (*search_documents, *holdout_documents)))
    measures = (*objectives, *constraints)
    metrics = {
        item.task: tuple(
            dict.fromkeys((other.metric, other.filter) for other in measures if other.task == item.task)
        )
        for item in measures
    }
    prepared = PreparedRun(
        experiment=resolved,
        stages=stages,
        objectives=objectives,
        constraints=constraints,
        search_documents=search_documents,
        holdout_documents=holdout_documents,
        checkpoints=by_name,
        base=base,
        sources=sources,
        library=library,
        spec=WorkerSpec(
            models={name: checkpoint.folder for name, checkpoint in by_name.items()},
            donor=donor,
            tasks=task_names,
            include_path=include_path,
            metrics=metrics,
            evaluation=resolved.evaluation,
            device=torch_device(resolved.evaluation.device),
            threads=resolved.workers.threads,
            allow_task_code=allow_task_code or allow_code,
            own=tuple(item for item in measures if item.own is not None),
            code=code if allow_code else None,
            memory_budget=resolved.workers.memory_budget,
        ),
        code=code,
        warnings=(
            *_config_differences(by_name, donor),
            *warnings_of_own(resolved, None if allow_code else code),
        ),
    )
    checks.context(prepared)
    checks.stop_if_faulty()
    return prepared


def stages_of(settings: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The searches of a run.

    Args:
        settings: Its resolved experiment, from the header of its journal.

    Raises:
        ConfigurationError: A model is not there any more.
    """
    experiment = Experiment.model_validate(settings)
    checkpoints = {
        name: Checkpoint.open(resolve(ModelReference.parse(name))) for name in experiment.all_models
    }
    document = Document(data=settings)
    checks = _Checks(document)
    options, spaces = checks.options(experiment), checks.spaces(experiment, Path("/"))
    checks.stop_if_faulty()
    sources = tuple(experiment.models)
    return _stages(experiment, spaces, options, checkpoints, sources, experiment.base_model)


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, every default written out."""
    plain: dict[str, Any] = json.loads(json.dumps(TypeAdapter(Experiment).dump_python(experiment)))
    return plain


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash of an experiment's plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class _Checks:
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
                document = read_single(_absolute(space, folder))
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

    def context(self, prepared: PreparedRun) -> None:
        """Make sure that every document fits the context of every model, which are scored one by one at the end."""
        spec = prepared.spec
        screened = (LIKELIHOOD,) if spec.evaluation.screen is not None else ()
        with self._collect_at(_task_places(prepared.experiment)):
            check_context(
                (*prepared.search_documents, *prepared.holdout_documents),
                prepared.library,
                {name: (*pairs, *screened) for name, pairs in spec.metrics.items()},
                spec.evaluation,
                spec.models,
            )

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


def _config_differences(checkpoints: Mapping[str, Checkpoint], donor: str) -> Iterator[str]:
    for name, checkpoint in checkpoints.items():
        differing = differing_keys(checkpoint, checkpoints[donor])
        if differing:
            yield (
                f"the config of {name} differs from that of {donor} in {', '.join(differing)}; merged models "
                f"get the config of {donor}"
            )


def _moves_layers(space: Document) -> bool:
    """Whether candidates put layers in another order instead of merging them."""
    kind = space.data.get("type") if isinstance(space.data, dict) else None
    return kind in SPACES and SPACES[kind].moves_layers


def _stages(
    experiment: Experiment,
    spaces: Sequence[Document],
    options: Sequence[SearcherOptions],
    checkpoints: Mapping[str, Checkpoint],
    sources: tuple[str, ...],
    base: str | None,
) -> tuple[Stage, ...]:
    """Fit every search space to its models, and plan its start, which every candidate resembles.

    The winner of a search has the architecture of the model that gives it its config, which stands in for it
    here, as nothing but architecture matters yet.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    stages: list[Stage] = []
    winner: tuple[str, ...] = ()
    known = dict(checkpoints)
    for settings, document, its_options in zip(experiment.searches, spaces, options, strict=True):
        models = (*winner, *(sources if settings.models is None else settings.models))
        fitted = source_models(known, models, base, anatomies=needs_anatomies(document))
        space = build_space(document, fitted)
        if chooses_layers(document) and settings.name != experiment.searches[-1].name:
            reason = (
                "only the last stage may choose layers: what is merged after it would have to be fitted to a model "
                "whose layers are not known yet; put this stage last"
            )
            raise ConfigurationError(document.fault(("type",), reason))
        recipe = space.decode(tuple(dimension.start for dimension in space.dimensions))
        check_recipe(recipe)
        donor = plan_merge(recipe, known).donor
        known[settings.name] = known[donor]
        winner = (settings.name,)
        search = settings.search
        stages.append(
            Stage(
                name=settings.name,
                space=space,
                new_searcher=partial(
                    build_searcher, search.algorithm, space.dimensions, search.seed, its_options
                ),
                evaluations=search.evaluations,
                donor=donor,
                first=sum(stage.evaluations for stage in stages),
                depths=fitted.depths,
            )
        )
    return tuple(stages)


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


def _resolved_spaces(experiment: Experiment, spaces: Sequence[Any]) -> dict[str, Any]:
    """The search spaces written out, as fields of the experiment."""
    if not experiment.stages:
        return {"search_space": spaces[0]}
    return {
        "stages": [
            stage.model_copy(update={"search_space": space})
            for stage, space in zip(experiment.stages, spaces, strict=True)
        ]
    }


def source_models(
    checkpoints: Mapping[str, Checkpoint], sources: tuple[str, ...], base: str | None, *, anatomies: bool
) -> SourceModels:
    """What a search space has to know of the models."""
    donor = checkpoints[base or sources[0]]
    found = {TORCH_DTYPES[info.dtype] for info in donor.tensors.values() if info.dtype in TORCH_DTYPES}
    models = dict.fromkeys([*sources, *([base] if base else [])])
    return SourceModels(
        models=sources,
        base=base,
        num_layers=num_layers(donor.tensors),
        dtype=found.pop() if len(found) == 1 else "float32",
        depths={model: num_layers(checkpoints[model].tensors) for model in models},
        anatomies={model: anatomy_of(checkpoints[model]) for model in sources} if anatomies else {},
        sizes={model: size_of(checkpoints[model]) for model in sources},
    )


def _recipe_name(text: str, folder: Path) -> str:
    """How recipes name a model: a hub id as it is, local folders by their absolute paths."""
    return str(absolute(ModelReference.parse(text), [folder]))


def _rename_models(document: Document, names: Mapping[str, str]) -> Document:
    """Let a search space name models as the experiment does."""
    if not isinstance(document.data, dict) or not isinstance(document.data.get("sources"), dict):
        return document
    sources = {names.get(text, text): value for text, value in document.data["sources"].items()}
    lines = {
        tuple(
            names.get(str(part), part) if depth == 1 and place[0] == "sources" else part
            for depth, part in enumerate(place)
        ): line
        for place, line in document.lines.items()
    }
    return replace(document, data={**document.data, "sources": sources}, lines=lines)


def _absolute(text: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / Path(text).expanduser()))  # noqa: PTH100 - keeps symlinks


def torch_device(text: str) -> str:
    """The device that `evaluation.device` means."""
    if text != "auto":
        return text
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
