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
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, absolute, resolve
from evomerge.checkpoints.tokenizer import difference, same_vocabulary
from evomerge.errors import CheckpointError, ConfigurationError, Fault, nearest
from evomerge.experiment import Experiment, read_experiment
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.harness import TaskLibrary, split_documents
from evomerge.fitness.objectives import Objective
from evomerge.merge.check import check_recipe
from evomerge.merge.layout import tied_heads
from evomerge.merge.plan import TORCH_DTYPES, plan_merge
from evomerge.search import SEARCHERS, Searcher, SearcherOptions, build_searcher
from evomerge.spaces import SearchSpace, SourceModels, build_space
from evomerge.workers.base import WorkerSpec
from evomerge.yaml_file import Document, FieldPath, read_single, validate

CONFIG_KEYS_THAT_MAY_DIFFER = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Config entries in which merged models may differ without computing anything else."""


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Everything a run needs, checked.

    Attributes:
        experiment: The experiment with everything it left open filled in: absolute paths, the search space,
            filters and directions.
        space: Its search space.
        objectives: What to optimise.
        search_documents: Documents that candidates are scored on.
        holdout_documents: Documents that judge the result; empty when none were kept.
        checkpoints: Model as recipes name it -> its checkpoint.
        base: The base model as recipes name it, or None.
        sources: The source models as recipes name them.
        library: The loaded tasks.
        spec: What each worker needs.
        searcher_options: The algorithm's own options.
        inputs: Model or task -> hash of its content.
        warnings: What is unusual but not wrong.
    """

    experiment: Experiment
    space: SearchSpace
    objectives: tuple[Objective, ...]
    search_documents: tuple[DocumentSet, ...]
    holdout_documents: tuple[DocumentSet, ...]
    checkpoints: Mapping[str, Checkpoint]
    base: str | None
    sources: tuple[str, ...]
    library: TaskLibrary
    spec: WorkerSpec
    searcher_options: SearcherOptions
    inputs: Mapping[str, str]
    warnings: tuple[str, ...]

    def new_searcher(self) -> Searcher:
        """A fresh searcher; told the recorded fitness again, it proposes the recorded genomes again."""
        search = self.experiment.search
        return build_searcher(search.algorithm, self.space.dimensions, search.seed, self.searcher_options)


def prepare(path: Path, *, overrides: Sequence[str] = (), allow_task_code: bool = False) -> PreparedRun:
    """Read an experiment file and check everything it names.

    Args:
        path: The experiment file.
        overrides: `path=value` texts; see `read_experiment`.
        allow_task_code: Whether task files outside lm-eval may run Python code.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    experiment, document = read_experiment(path, overrides)
    folder = path.resolve().parent
    checks = _Checks(document)
    checkpoints = checks.models(experiment, folder)
    space_document = checks.space_document(experiment, folder)
    with checks.collect():
        searcher_options = _searcher_options(experiment, document)
    include_path = tuple(_absolute(text, folder) for text in experiment.evaluation.include_path)
    tasks = checks.tasks(experiment, include_path, allow_code=allow_task_code)
    checks.stop_if_faulty()

    names = {text: _recipe_name(text, folder) for text in experiment.all_models}
    by_name = {names[text]: checkpoint for text, checkpoint in checkpoints.items()}
    base = names[experiment.base_model] if experiment.base_model is not None else None
    sources = tuple(names[text] for text in experiment.models)
    donor = base or sources[0]
    space_document = _rename_models(space_document, names)
    with checks.collect():
        space = _build_space(space_document, by_name, sources, base)
    checks.stop_if_faulty()
    library, objectives = tasks
    search_documents, holdout_documents = _documents(experiment, library)
    resolved = experiment.model_copy(
        update={
            "models": list(sources),
            "base_model": base,
            "search_space": space_document.data,
            "objectives": [
                settings.model_copy(
                    update={
                        "filter": objective.filter,
                        "direction": "maximize" if objective.maximize else "minimize",
                    }
                )
                for settings, objective in zip(experiment.objectives, objectives, strict=True)
            ],
            "evaluation": experiment.evaluation.model_copy(
                update={"include_path": [str(folder) for folder in include_path]}
            ),
        }
    )
    task_names = tuple(dict.fromkeys(item.task for item in (*search_documents, *holdout_documents)))
    inputs = {f"model {name}": checkpoint.content_hash()[:16] for name, checkpoint in by_name.items()}
    inputs |= {f"task {name}": library.fingerprint(name) for name in task_names}
    metrics = {
        item.task: tuple((other.metric, other.filter) for other in objectives if other.task == item.task)
        for item in objectives
    }
    return PreparedRun(
        experiment=resolved,
        space=space,
        objectives=objectives,
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
            allow_task_code=allow_task_code,
            memory_budget=resolved.workers.memory_budget,
        ),
        searcher_options=searcher_options,
        inputs=inputs,
        warnings=tuple(_config_differences(by_name, donor)),
    )


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
        donor = experiment.base_model or experiment.models[0]
        if donor not in found:
            return found
        for text, checkpoint in found.items():
            with self.collect(places[text]):
                _check_compatible(checkpoint, found[donor], donor)
        return found

    def space_document(self, experiment: Experiment, folder: Path) -> Document:
        """The search space's YAML, from its file or from the experiment itself."""
        if isinstance(experiment.search_space, str):
            document = Document(data={})
            with self.collect(("search_space",)):
                document = read_single(_absolute(experiment.search_space, folder))
            return document  # noqa: RET504 - `collect` swallows faults
        lines = {
            place[1:]: line for place, line in self.document.lines.items() if place[:1] == ("search_space",)
        }
        return Document(
            data=experiment.search_space, file=self.document.file, lines=lines, prefix=("search_space",)
        )

    def tasks(
        self, experiment: Experiment, include_path: tuple[Path, ...], *, allow_code: bool
    ) -> tuple[TaskLibrary, tuple[Objective, ...]]:
        """Load the tasks and look up the metrics."""
        places: dict[str, FieldPath] = {}
        for index, objective in enumerate(experiment.objectives):
            places.setdefault(objective.task, ("objectives", index, "task"))
            if objective.holdout_task is not None:
                places.setdefault(objective.holdout_task, ("objectives", index, "holdout_task"))
        library = None
        try:
            library = TaskLibrary(list(places), include_path, allow_code=allow_code)
        except ConfigurationError as error:
            for fault in error.faults:
                place = places.get(fault.path, tuple(fault.path.split(".")))
                self.faults.append(self.document.fault(place, fault.reason))
        if library is None:
            return None, ()  # type: ignore[return-value]  # the caller stops at the faults
        objectives = []
        for index, settings in enumerate(experiment.objectives):
            with self.collect():
                objectives.append(library.objective(settings, index))
                if settings.holdout_task is not None:
                    same = {"task": settings.holdout_task, "filter": objectives[-1].filter}
                    library.objective(settings.model_copy(update=same), index)
        return library, tuple(objectives)


def _check_compatible(checkpoint: Checkpoint, donor: Checkpoint, donor_name: str) -> None:
    """Refuse models that cannot be merged with the donor, by architecture, tensors or vocabulary."""
    for key in ("model_type", "architectures"):
        found, expected = checkpoint.config.get(key), donor.config.get(key)
        if found != expected:
            reason = f"its {key} is {found}, that of {donor_name} is {expected}; models must share one architecture"
            raise CheckpointError(Fault(path="", reason=reason))
    ours, theirs = (set(model.tensors) - set(tied_heads(model)) for model in (checkpoint, donor))
    for name in sorted(ours ^ theirs):
        has, lacks = ("it", donor_name) if name in ours else (donor_name, "it")
        reason = f"{name}: {has} has this tensor and {lacks} has not; models must share one architecture"
        raise CheckpointError(Fault(path="", reason=reason))
    for name in sorted(ours):
        info, other = checkpoint.tensors[name], donor.tensors[name]
        if info.shape != other.shape:
            reason = f"{name}: its shape is {list(info.shape)}, in {donor_name} {list(other.shape)}"
            raise CheckpointError(Fault(path="", reason=reason))
    if same_vocabulary(checkpoint.folder, donor.folder) is False:
        words = difference(checkpoint.folder, donor.folder)
        reason = (
            f"its vocabulary differs from that of {donor_name}: {words}; models must share one vocabulary"
        )
        raise CheckpointError(Fault(path="", reason=reason))


def _config_differences(checkpoints: Mapping[str, Checkpoint], donor: str) -> Iterator[str]:
    reference = checkpoints[donor].config
    for name, checkpoint in checkpoints.items():
        keys = (set(reference) | set(checkpoint.config)) - CONFIG_KEYS_THAT_MAY_DIFFER
        differing = sorted(key for key in keys if reference.get(key) != checkpoint.config.get(key))
        if differing:
            yield (
                f"the config of {name} differs from that of {donor} in {', '.join(differing)}; merged models "
                f"get the config of {donor}"
            )


def _searcher_options(experiment: Experiment, document: Document) -> SearcherOptions:
    search = experiment.search
    spec = SEARCHERS.get(search.algorithm)
    if spec is None:
        known = ", ".join(sorted(SEARCHERS))
        reason = f"expected one of {known}, got {search.algorithm!r}{nearest(search.algorithm, SEARCHERS)}"
        raise ConfigurationError(document.fault(("search", "algorithm"), reason))
    nested = replace(document, data={"search": search.options})
    return validate(spec.options, nested, at=("search",))


def _build_space(
    document: Document, checkpoints: Mapping[str, Checkpoint], sources: tuple[str, ...], base: str | None
) -> SearchSpace:
    """Fit the space to the models and plan its starting point, which every candidate resembles."""
    space = build_space(document, source_models(checkpoints, sources, base))
    recipe = space.decode(tuple(dimension.start for dimension in space.dimensions))
    check_recipe(recipe)
    plan_merge(recipe, checkpoints)
    return space


def source_models(
    checkpoints: Mapping[str, Checkpoint], sources: tuple[str, ...], base: str | None
) -> SourceModels:
    """What a search space has to know of the models."""
    donor = checkpoints[base or sources[0]]
    found = {TORCH_DTYPES[info.dtype] for info in donor.tensors.values() if info.dtype in TORCH_DTYPES}
    return SourceModels(
        models=sources,
        base=base,
        num_layers=num_layers(donor.tensors),
        dtype=found.pop() if len(found) == 1 else "float32",
    )


def _documents(
    experiment: Experiment, library: TaskLibrary
) -> tuple[tuple[DocumentSet, ...], tuple[DocumentSet, ...]]:
    """Choose the documents of the search and of the holdout for every task."""
    searched: dict[str, DocumentSet] = {}
    held_out: dict[str, DocumentSet] = {}
    evaluation = experiment.evaluation
    for objective in experiment.objectives:
        name, other = objective.task, objective.holdout_task
        count = library.num_documents(name)
        share = evaluation.holdout if other is None else 0.0
        search_ids, holdout_ids = split_documents(name, count, holdout=share, limit=evaluation.limit)
        searched[name] = DocumentSet(
            task=name, doc_ids=search_ids, name=name, complete=len(search_ids) == count
        )
        if other is not None:
            every = tuple(range(library.num_documents(other)))
            held_out[name] = DocumentSet(task=other, doc_ids=every, name=name, complete=True)
        elif holdout_ids:
            held_out[name] = DocumentSet(task=name, doc_ids=holdout_ids, name=name)
    complete = len(held_out) == len(searched)
    return tuple(searched.values()), tuple(held_out.values()) if complete else ()


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
