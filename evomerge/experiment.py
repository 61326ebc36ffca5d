"""The experiment: everything an `experiment.yml` may say, and where its relative paths point.

Shape and ranges are checked here. What the searcher, the space, the models and the tasks have to say about
it is checked where they are built; see `prepare.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from evomerge.errors import ConfigurationError
from evomerge.sizes import parse_size
from evomerge.yaml_file import Document, StrictRecord, dotted, read_single, validate


class ObjectiveSettings(StrictRecord):
    """One number to optimise.

    Attributes:
        task: Name of an lm-eval task.
        metric: One of the task's metrics.
        filter: Which of the task's filters to read the metric from; its first by default.
        weight: Share in the fitness, the weighted mean over objectives.
        direction: Whether larger or smaller is better; what the task says by default.
        holdout_task: Task whose documents judge the result, instead of a part of this task's documents.
    """

    task: str
    metric: str
    filter: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    direction: Literal["maximize", "minimize"] | None = None
    holdout_task: str | None = None


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


class EvaluationSettings(StrictRecord):
    """How a candidate is scored.

    Attributes:
        backend: `hf`: lm-eval over the live transformers model.
        batch_size: Requests per batch, fixed within a run; `auto` is the constant 32.
        holdout: Share of each task's documents kept for the final judgement, unless it has a holdout task.
        limit: Most documents per task to search on, drawn by a fixed hash; null for all.
        max_length: Context length in tokens; the model's own by default.
        num_fewshot: Examples in the prompt; the task's own number by default.
        apply_chat_template: Wrap prompts in the tokenizer's chat template.
        system_instruction: System prompt.
        dtype: Type of the live model; `auto` is the type the base model is stored in.
        softmax_dtype: Type in which probabilities are computed.
        attention: transformers' attention implementation; its own choice by default.
        device: Torch device of each worker; `auto` is the GPU when there is one.
        include_path: Folders with lm-eval tasks, beside those that lm-eval ships.
    """

    backend: Literal["hf"] = "hf"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    limit: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    softmax_dtype: Literal["float32", "float64"] = "float32"
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    device: str = "auto"
    include_path: list[str] = []


def _as_seconds(value: Any) -> Any:
    """Read `90`, `90s`, `30m` or `2h` as seconds."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
        if match is None:
            raise ValueError(f"expected a duration such as 90s, 30m or 2h, got {value!r}")
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
    timeout: Annotated[float, Field(gt=0), BeforeValidator(_as_seconds)] = 1800.0
    retries: Annotated[int, Field(ge=0)] = 2
    memory_budget: Annotated[int, Field(ge=1), BeforeValidator(_as_bytes)] | None = None


class FinishSettings(StrictRecord):
    """What happens when the search is over.

    Attributes:
        baseline_scales: Task arithmetic is tried with each of these scales on the search documents, and the
            best of them is compared with the winner; empty to leave this baseline out.
        export_model: Keep the winner as a checkpoint in `best/model`.
    """

    baseline_scales: list[Annotated[float, Field(gt=0)]] = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    export_model: bool = False


class Experiment(StrictRecord):
    """A search for the best merge.

    Attributes:
        name: Names the run directory `runs/<name>`.
        models: Source models: `id-or-path[@revision][+adapter]`, paths relative to the experiment's file.
        base_model: The model the sources were fine-tuned from; gives config and tokenizer.
        search_space: A search space file, or its contents.
        objectives: What to optimise.
        search: How to search.
        evaluation: How a candidate is scored.
        workers: The processes that evaluate candidates.
        finish: What happens when the search is over.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    models: Annotated[list[str], Field(min_length=1)]
    base_model: str | None = None
    search_space: str | dict[str, Any]
    objectives: Annotated[list[ObjectiveSettings], Field(min_length=1)]
    search: SearchSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    workers: WorkerSettings = WorkerSettings()
    finish: FinishSettings = FinishSettings()

    @model_validator(mode="after")
    def _check_lists(self) -> Experiment:
        repeated = sorted({model for model in self.models if self.models.count(model) > 1})
        if repeated:
            raise ValueError(f"models: {', '.join(repeated)} named twice")
        pairs = [(item.task, item.metric, item.filter) for item in self.objectives]
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

    @property
    def all_models(self) -> tuple[str, ...]:
        """The source models and the base, each once."""
        return tuple(dict.fromkeys([*self.models, *([self.base_model] if self.base_model else [])]))


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
