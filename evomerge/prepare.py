"""From an experiment file to everything a run needs, with every fault found before a model is loaded.

Only headers of weight files, configs, tokenizers and task files are read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from evomerge.build_stages import build_stages, moves_layers
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, absolute, resolve
from evomerge.checks import Checks, absolute_path
from evomerge.experiment import Experiment, read_experiment
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint, as_settings
from evomerge.fitness.documents import choose_documents
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.objectives import Measure, Objective
from evomerge.fitness.user_code import UserCode
from evomerge.merge.compatible import differing_keys
from evomerge.own_code import code_folder, refuse_code, survey_code, warnings_of_own
from evomerge.stages import Stage
from evomerge.workers.base import WorkerSpec
from evomerge.yaml_file import Document


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
    checks = Checks(document)
    checkpoints = checks.models(experiment, folder)
    spaces = checks.spaces(experiment, folder)
    checks.compatible(experiment, checkpoints, movable=all(map(moves_layers, spaces)))
    options = checks.options(experiment)
    include_path = tuple(absolute_path(text, folder) for text in experiment.evaluation.include_path)
    data_dir = experiment.evaluation.data_dir
    if data_dir is not None:
        data_dir = str(absolute_path(data_dir, folder))
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
        stages = build_stages(experiment, spaces, options, by_name, sources, base)
    checks.stop_if_faulty()
    library, objectives, constraints = tasks
    search_documents, holdout_documents = choose_documents(experiment, constraints, library)
    evaluation = experiment.evaluation.model_copy(
        update={
            "include_path": [str(folder) for folder in include_path],
            "data_dir": data_dir,
            "code_path": None if code is None else str(code_folder(experiment, folder)),
        }
    )
    resolved = experiment.model_copy(
        update={
            "models": list(sources),
            "base_model": base,
            "evaluation": evaluation,
            **_resolved_spaces(experiment, [space.data for space in spaces]),
            **_resolved_measures(experiment, objectives, constraints),
        }
    )
    task_names = tuple(dict.fromkeys(item.task for item in (*search_documents, *holdout_documents)))
    measures = (*objectives, *constraints)
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
            metrics=_metrics(measures),
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
    documents = (*search_documents, *holdout_documents)
    checks.context(resolved, documents, library, prepared.spec)
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
    checks = Checks(document)
    options, spaces = checks.options(experiment), checks.spaces(experiment, Path("/"))
    checks.stop_if_faulty()
    sources = tuple(experiment.models)
    return build_stages(experiment, spaces, options, checkpoints, sources, experiment.base_model)


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, every default written out."""
    plain: dict[str, Any] = json.loads(json.dumps(TypeAdapter(Experiment).dump_python(experiment)))
    return plain


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash of an experiment's plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _config_differences(checkpoints: Mapping[str, Checkpoint], donor: str) -> Iterator[str]:
    for name, checkpoint in checkpoints.items():
        differing = differing_keys(checkpoint, checkpoints[donor])
        if differing:
            yield (
                f"the config of {name} differs from that of {donor} in {', '.join(differing)}; merged models "
                f"get the config of {donor}"
            )


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


def _resolved_measures(
    experiment: Experiment, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> dict[str, Any]:
    """Objectives and constraints with everything they left open, as fields of the experiment."""
    return {
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
    }


def _metrics(measures: Sequence[Measure]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Task as the objectives name it -> the (metric, filter) pairs wanted."""
    return {
        item.task: tuple(
            dict.fromkeys((other.metric, other.filter) for other in measures if other.task == item.task)
        )
        for item in measures
    }


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


def torch_device(text: str) -> str:
    """The device that `evaluation.device` means."""
    if text != "auto":
        return text
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
