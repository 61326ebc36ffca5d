"""The experiment: everything an `experiment.yml` may say, and where its relative paths point.

Shape and ranges are checked here. What the searcher, the space, the models and the tasks have to say about
it is checked where they are built; see `prepare.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from evomerge.errors import ConfigurationError
from evomerge.measure_settings import Finite, MeasureSettings, OwnSettings
from evomerge.sizes import as_seconds, parse_size
from evomerge.yaml_file import Document, StrictRecord, dotted, read_single, validate


class ObjectiveSettings(MeasureSettings):
    """One number to optimise; see `MeasureSettings` for what it may be.

    Attributes:
        task: Name of an lm-eval task.
        weight: Share in the fitness, the weighted mean over objectives.
        normalize: `sources`: count the share of what the best source model reaches, instead of the score.
        holdout_task: Task whose documents judge the result, instead of a part of this task's documents.
    """

    task: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    normalize: Literal["sources"] | None = None
    holdout_task: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        if self.measured is None:
            raise ValueError("metric: missing; an objective needs it, or fitness, or judge")
        return self


class ConstraintSettings(MeasureSettings):
    """What a candidate must hold to win; see `fitness.constraints`.

    Of a measure, `metric` may also be the name of an objective's function or judge on the same task. Without any,
    the entry, with `retention` alone, is about every objective's own.

    Attributes:
        task: Name of an lm-eval task, of an objective or not; null for every objective that has the metric.
        min: Smallest value of the metric.
        max: Largest value of the metric.
        retention: Smallest share of what the best source model reaches.
    """

    task: str | None = None
    min: Finite | None = None
    max: Finite | None = None
    retention: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ConstraintSettings:
        if self.min is None and self.max is None and self.retention is None:
            raise ValueError("expected min, max or retention")
        if self.measured is None:
            for key in ("task", "filter", "direction", "min", "max"):
                if getattr(self, key) is not None:
                    raise ValueError(f"metric: missing; {key} is about a metric")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min:g} is above max, {self.max:g}, so that nothing can hold both")
        return self


class SearchSettings(StrictRecord):
    """How to search; further keys are options of the algorithm (`evomerge searchers`).

    Attributes:
        algorithm: Name of a searcher.
        evaluations: Number of candidates to evaluate.
        seed: Seed of the searcher.
        schedule: `generational`: the searcher learns at the end of each generation.
    """

    model_config = ConfigDict(extra="allow")

    algorithm: str = "cma-es"
    evaluations: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    schedule: Literal["generational"] = "generational"

    @property
    def options(self) -> dict[str, Any]:
        """The algorithm's own options."""
        return dict(self.model_extra or {})


class RacingSettings(StrictRecord):
    """How candidates of a generation race; see `fitness.racing`.

    Attributes:
        blocks: Share of the search documents after each block but the last, rising.
        error_rate: Largest expected share of those that the searcher would select that goes out of the race.
        front: Whether candidates go on that may be on the Pareto front of the objectives.
    """

    blocks: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.8,
    ]
    error_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.3
    front: bool = False

    @model_validator(mode="after")
    def _check_blocks(self) -> RacingSettings:
        if sorted(set(self.blocks)) != self.blocks:
            raise ValueError(f"blocks: expected rising shares, got {self.blocks}")
        return self


class ScreenSettings(StrictRecord):
    """How a generation is screened before it is scored; see `fitness.screen`.

    Attributes:
        metric: What candidates are screened by: the likelihood of the tasks' reference answers.
        keep: Share of the generation that is scored, the best by that metric.
    """

    metric: Literal["likelihood"] = "likelihood"
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5


class EvaluationSettings(StrictRecord):
    """How a candidate is scored.

    Attributes:
        backend: `hf`: lm-eval over the live transformers model.
        batch_size: Requests per batch, fixed within a run; `auto` is found once, from the machine's memory, and
            recorded with the run.
        holdout: Share of each task's documents kept for the final judgement, unless it has a holdout task.
        limit: Most documents per task to search on, drawn by a fixed hash; null for all.
        racing: Score candidates in blocks of documents and stop those that cannot matter; null to score all of
            them on all documents.
        screen: Score only the part of a generation that is best by a cheap metric; null to score all of it.
        max_length: Context length in tokens; the model's own by default.
        num_fewshot: Examples in the prompt; the task's own number by default.
        apply_chat_template: Wrap prompts in the tokenizer's chat template.
        system_instruction: System prompt.
        dtype: Type of the live model; `auto` is the type the base model is stored in.
        softmax_dtype: Type in which probabilities are computed.
        attention: transformers' attention implementation; its own choice by default.
        device: Torch device of each worker; `auto` is the GPU when there is one.
        include_path: Folders with lm-eval tasks, beside those that lm-eval ships.
        data_dir: Folder with data sets as their authors publish them (`mgsm_ja.tsv`, `train.jsonl`), for the
            tasks in `tasks/` that can read them; null for the Hugging Face hub.
        code_path: Folder with the user's own functions, which are looked for there, then on Python's import path;
            the experiment file's folder by default.
    """

    backend: Literal["hf"] = "hf"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    limit: Annotated[int, Field(ge=1)] | None = None
    racing: RacingSettings | None = None
    screen: ScreenSettings | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    softmax_dtype: Literal["float32", "float64"] = "float32"
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    device: str = "auto"
    include_path: list[str] = []
    data_dir: str | None = None
    code_path: str | None = None


def _as_bytes(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


class WorkerSettings(StrictRecord):
    """The processes that evaluate candidates.

    Attributes:
        backend: `ray` runs workers on a Ray cluster, local unless `RAY_ADDRESS` says otherwise; `inline`
            evaluates in the controller, for debugging.
        count: Number of workers; `auto` is as many as cores, memory and GPUs carry.
        threads: CPU threads of each worker.
        gpus_per_worker: GPUs of each worker, fractions allowed; `auto` is 1 when there are any, else 0.
        timeout: Longest time for one candidate, such as 30m; a worker that takes longer is replaced.
        retries: How often a candidate is dispatched again after its worker died or timed out.
        memory_budget: Memory that the source weights may take in each worker, such as 8GB; null for all of
            them. What does not fit is read again for every candidate. On the CPU sources are memory-mapped and
            shared by the workers of a host, on a GPU each worker keeps copies.
    """

    backend: Literal["ray", "inline"] = "ray"
    count: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    threads: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    timeout: Annotated[float, Field(gt=0), BeforeValidator(as_seconds)] = 1800.0
    retries: Annotated[int, Field(ge=0)] = 2
    memory_budget: Annotated[int, Field(ge=1), BeforeValidator(_as_bytes)] | None = None


class FinishSettings(StrictRecord):
    """What happens when the search is over.

    Attributes:
        confirm: How many of the best candidates are scored a second time on the search documents before the
            winner is named; 0 to name the best of the search.
        baseline_scales: Task arithmetic is tried with each of these scales on the search documents, and the
            best of them is compared with the winner; empty to leave this baseline out.
        export_model: Keep the winner as a checkpoint in `best/model`.
    """

    confirm: Annotated[int, Field(ge=0)] = 3
    baseline_scales: list[Annotated[float, Field(gt=0)]] = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    export_model: bool = False


class StageSettings(StrictRecord):
    """One search of an experiment that has several, one after the other.

    Attributes:
        name: Names its winner, which the next stage has as its first source model.
        models: Which of the experiment's models it has as sources; all of them by default.
        search_space: A search space file, or its contents.
        search: How to search.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    models: Annotated[list[str], Field(min_length=1)] | None = None
    search_space: str | dict[str, Any]
    search: SearchSettings


class Experiment(StrictRecord):
    """A search for the best merge.

    Attributes:
        name: Names the run directory `runs/<name>`.
        models: Source models: `id-or-path[@revision][+adapter]`, paths relative to the experiment's file.
        base_model: The model the sources were fine-tuned from; gives config and tokenizer.
        search_space: A search space file, or its contents.
        search: How to search.
        stages: Several searches one after the other, in place of `search_space` and `search`.
        objectives: What to optimise.
        constraints: What a candidate must hold to win.
        evaluation: How a candidate is scored.
        workers: The processes that evaluate candidates.
        finish: What happens when the search is over.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    models: Annotated[list[str], Field(min_length=1)]
    base_model: str | None = None
    search_space: str | dict[str, Any] | None = None
    search: SearchSettings | None = None
    stages: list[StageSettings] = []
    objectives: Annotated[list[ObjectiveSettings], Field(min_length=1)]
    constraints: list[ConstraintSettings] = []
    evaluation: EvaluationSettings = EvaluationSettings()
    workers: WorkerSettings = WorkerSettings()
    finish: FinishSettings = FinishSettings()

    @model_validator(mode="after")
    def _check_stages(self) -> Experiment:
        if self.stages:
            for key in ("search_space", "search"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: every stage has its own; remove it, or remove 'stages'")
            names = [stage.name for stage in self.stages]
            if len(set(names)) < len(names):
                raise ValueError(f"stages: names must differ, got {', '.join(names)}")
            taken = sorted(set(names) & set(self.all_models))
            if taken:
                raise ValueError(f"stages: {', '.join(taken)} is the name of a model already")
            for stage in self.stages:
                unknown = [model for model in stage.models or [] if model not in self.models]
                if unknown:
                    known = ", ".join(self.models)
                    raise ValueError(
                        f"stages: {stage.name}: {unknown[0]} is none of the experiment's models ({known})"
                    )
        else:
            for key in ("search_space", "search"):
                if getattr(self, key) is None:
                    raise ValueError(f"{key}: missing; an experiment needs it, or 'stages'")
        return self

    @model_validator(mode="after")
    def _check_lists(self) -> Experiment:
        repeated = sorted({model for model in self.models if self.models.count(model) > 1})
        if repeated:
            raise ValueError(f"models: {', '.join(repeated)} named twice")
        pairs = [(item.task, item.measured, item.filter) for item in self.objectives]
        if len(set(pairs)) < len(pairs):
            raise ValueError("objectives: the same task and metric are named twice")
        holdouts = {
            item.task: {other.holdout_task for other in self.objectives if other.task == item.task}
            for item in self.objectives
        }
        for task, names in holdouts.items():
            if len(names) > 1:
                raise ValueError(f"objectives: the metrics of {task} must share one holdout_task")
        return self

    @model_validator(mode="after")
    def _check_own(self) -> Experiment:
        """One name of a task's measures means one thing."""
        known: dict[tuple[str, str | None], OwnSettings] = {}
        tasks = list(dict.fromkeys(item.task for item in self.objectives))
        for item in (*self.objectives, *self.constraints):
            for task in [item.task] if item.task is not None else tasks:
                if item.own is None or known.setdefault((task, item.measured), item.own) == item.own:
                    continue
                if item.judge is None:
                    raise ValueError(
                        f"{item.fitness} is given different things; leave one of the entries out"
                    )
                raise ValueError(f"two judges of {task} are called {item.measured!r}; give one a name")
        return self

    @property
    def all_models(self) -> tuple[str, ...]:
        """The source models and the base, each once."""
        return tuple(dict.fromkeys([*self.models, *([self.base_model] if self.base_model else [])]))

    @property
    def searches(self) -> tuple[StageSettings, ...]:
        """The searches in their order; one, named `search`, unless there are stages."""
        if self.stages:
            return tuple(self.stages)
        assert self.search_space is not None
        assert self.search is not None
        return (StageSettings(name="search", search_space=self.search_space, search=self.search),)

    def place(self, number: int) -> tuple[str | int, ...]:
        """Where the settings of a search lie in the file."""
        return ("stages", number) if self.stages else ()

    @property
    def evaluations(self) -> int:
        """Number of candidates of all searches."""
        return sum(stage.search.evaluations for stage in self.searches)


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> tuple[Experiment, Document]:
    """Read and check an experiment file.

    Args:
        path: The file.
        overrides: `path=value` texts that replace or add values before checking, such as
            `search.evaluations=20`; the value is YAML.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    document = read_single(path)
    for text in overrides:
        _override(document, text)
    return validate(Experiment, document), document


def _override(document: Document, text: str) -> None:
    where, separator, value_text = text.partition("=")
    keys = where.split(".")
    if not separator or not all(keys):
        raise ConfigurationError(f"--set {text}: expected path=value, such as search.evaluations=20")
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--set {text}: the value is not valid YAML: {error}") from None
    data = document.data
    for depth, key in enumerate(keys):
        here: Any = key
        if isinstance(data, list):
            if not key.isdigit() or int(key) >= len(data):
                reason = f"expected an index below {len(data)}, got {key!r}"
                raise ConfigurationError(f"--set {text}: {dotted(tuple(keys[:depth]))}: {reason}")
            here = int(key)
        elif not isinstance(data, dict):
            place = dotted(tuple(keys[:depth]))
            raise ConfigurationError(f"--set {text}: {place} holds a value, not further keys")
        if depth == len(keys) - 1:
            data[here] = value
        elif isinstance(data, dict) and here not in data:
            data[here] = {}
        data = data[here]


def looks_like_experiment(data: Any) -> bool:
    """Tell an experiment file from a recipe or a search space, for `evomerge validate`."""
    return isinstance(data, dict) and ("objectives" in data or "search_space" in data)
