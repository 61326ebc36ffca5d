"""lm-eval over a live model: the only module that imports lm_eval.

lm-eval's own entry point rebuilds every prompt and collects environment information at each call. Here tasks
are loaded once, prompts are built once per document set, and a call only resets the responses, runs the
requests and lets the task's own filters and metrics judge them. The scores equal those of the stock
`lm_eval` command for the same model, documents and settings, because the requests and their order are the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evomerge.errors import Fault, TaskError, nearest
from evomerge.experiment import EvaluationSettings, ObjectiveSettings
from evomerge.fitness.base import DocumentSet, NonFiniteLogitsError, Scores
from evomerge.fitness.objectives import Objective
from evomerge.records import SampleScores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_BATCH_SIZE = 32
"""Batch size behind `auto`. It is a constant, not a probe: scores in bfloat16 move with the batching, and a
probe may come out differently on another worker or day."""

FEWSHOT_SEED = 1234
"""lm-eval's default, so that the stock command draws the same examples."""


class TaskLibrary:
    """The lm-eval tasks of an experiment, loaded once.

    Args:
        names: Tasks to load.
        include_path: Folders with task files, beside those that lm-eval ships.
        allow_code: Whether task files outside lm-eval may run Python code.

    Raises:
        TaskError: Carries every fault found.
    """

    def __init__(self, names: Sequence[str], include_path: Sequence[Path], *, allow_code: bool) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.tasks: dict[str, Any] = {}
        self.folders: dict[str, Path] = {}
        for folder in include_path:
            if not folder.is_dir():
                reason = f"no such folder: {folder}"
                raise TaskError(Fault(path="evaluation.include_path", reason=reason))
        faults: list[Fault] = []
        index = self._index(names, include_path)
        for name in dict.fromkeys(names):
            try:
                self._load(name, index, include_path, allow_code=allow_code)
            except TaskError as error:
                faults += error.faults
        if faults:
            raise TaskError(faults)

    def _index(self, names: Sequence[str], include_path: Sequence[Path]) -> Any:
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=[str(path) for path in include_path], include_defaults=False)
        if all(name in own.all_tasks for name in names):
            return own
        # Reading lm-eval's thousands of task files takes seconds, so only when they are needed.
        return TaskManager(include_path=[str(path) for path in include_path], include_defaults=True)

    def _load(self, name: str, index: Any, include_path: Sequence[Path], *, allow_code: bool) -> None:
        if name not in index.all_tasks:
            where = ", ".join(str(path) for path in include_path) or "none given"
            reason = f"no such task{nearest(name, index.all_tasks)}; looked in lm-eval's own tasks and in "
            reason += (
                f"evaluation.include_path ({where}); a task file that is not valid YAML is skipped by lm-eval"
            )
            raise TaskError(Fault(path=name, reason=reason))
        entry = index.task_index[name]
        if name not in index.all_subtasks:
            members = ", ".join(sorted(entry.tags)) or "see its file"
            raise TaskError(Fault(path=name, reason=f"a group of tasks ({members}); name single tasks"))
        file = Path(entry.yaml_path)
        if not allow_code:
            _refuse_code(name, file)
        try:
            # Relative data files are meant relative to the task's file; datasets resolves them against cwd.
            with contextlib.chdir(file.parent), _quiet():
                self.tasks[name] = index.load([name])["tasks"][name]
        except Exception as error:  # lm-eval and datasets raise whatever comes
            reason = f"cannot be loaded from {file}: {type(error).__name__}: {error}"
            raise TaskError(Fault(path=name, reason=reason)) from error
        self.folders[name] = file.parent

    def num_documents(self, name: str) -> int:
        """Number of documents in the task's evaluation set."""
        return len(self.tasks[name].eval_docs)

    def fingerprint(self, name: str) -> str:
        """Hash of the task's documents and of how they are prompted and judged."""
        task = self.tasks[name]
        digest = hashlib.sha256()
        digest.update(json.dumps(_stable(task.dump_config()), sort_keys=True, default=str).encode())
        for document in task.eval_docs:
            digest.update(json.dumps(document, sort_keys=True, default=str, ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    def objective(self, settings: ObjectiveSettings, position: int) -> Objective:
        """Fill in what the experiment left to the task, for the objective at `position`.

        Raises:
            TaskError: The task has no such metric or filter.
        """
        task = self.tasks[settings.task]
        metrics = list(task.aggregation())
        filters = [str(pipeline.name) for pipeline in task._filters]
        where = f"objectives.{position}"
        if settings.metric not in metrics:
            reason = f"the task {settings.task} has no metric {settings.metric!r}"
            reason += f"{nearest(settings.metric, metrics)}; it has {', '.join(metrics)}"
            raise TaskError(Fault(path=f"{where}.metric", reason=reason))
        if settings.filter is not None and settings.filter not in filters:
            reason = f"the task {settings.task} has no filter {settings.filter!r}"
            reason += f"{nearest(settings.filter, filters)}; it has {', '.join(filters)}"
            raise TaskError(Fault(path=f"{where}.filter", reason=reason))
        direction = settings.direction
        if direction is None:
            direction = "maximize" if task.higher_is_better()[settings.metric] else "minimize"
        return Objective(
            task=settings.task,
            metric=settings.metric,
            filter=settings.filter or filters[0],
            weight=settings.weight,
            maximize=direction == "maximize",
        )

    def metrics(self, name: str) -> list[tuple[str, str]]:
        """Every (metric, filter) of a task."""
        task = self.tasks[name]
        return [(metric, str(pipeline.name)) for pipeline in task._filters for metric in task.aggregation()]


def _refuse_code(name: str, file: Path) -> None:
    """Refuse a task file that runs Python code, unless it is one of lm-eval's own."""
    import lm_eval

    if file.resolve().is_relative_to(Path(lm_eval.__file__).resolve().parent):
        return
    pending, seen = [file], set()
    while pending:
        current = pending.pop().resolve()
        if current in seen or not current.is_file():
            continue
        seen.add(current)
        text = re.sub(r"(^|\s)#.*", "", current.read_text(encoding="utf-8"))
        if re.search(r"!function|^class:|^unsafe_code:\s*true", text, re.MULTILINE):
            reason = f"{current} runs Python code; read it, and pass --allow-task-code if you trust it"
            raise TaskError(Fault(path=name, reason=reason))
        include = re.search(r"^include:\s*(.+)$", text, re.MULTILINE)
        if include:
            listed = yaml.safe_load(include[1])
            pending += [
                current.parent / str(item) for item in (listed if isinstance(listed, list) else [listed])
            ]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Requests of one document set: instances in request order, and grouped per document."""

    instances: list[Any]
    per_document: list[tuple[Any, list[Any]]]


class HarnessEvaluator:
    """Scores one live model with lm-eval's tasks.

    Args:
        model: The model; its present weights are scored at every call.
        tokenizer: Its tokenizer.
        library: The loaded tasks.
        metrics: Task as the objectives name it -> the (metric, filter) pairs wanted.
        settings: How to score.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        library: TaskLibrary,
        metrics: Mapping[str, Sequence[tuple[str, str]]],
        settings: EvaluationSettings,
    ) -> None:
        self._library = library
        self._metrics = metrics
        self._settings = settings
        self._prepared: dict[DocumentSet, _Prepared] = {}
        self._watch = _Watch()
        self._lm = _wrap(model, tokenizer, settings, self._watch)

    def evaluate(self, documents: Sequence[DocumentSet]) -> Scores:
        """Score the model's present weights, one task at a time, in lm-eval's own request order.

        Raises:
            NonFiniteLogitsError: The model's logits are not finite.
            TaskError: A metric does not give one number per document.
        """
        self._watch.reset()
        metrics: dict[str, dict[str, float]] = {}
        samples: dict[str, SampleScores] = {}
        for subset in documents:
            with _quiet(), self._watch.on(self._lm.model):
                values = self._score(subset)
            aggregation = self._library.tasks[subset.task].aggregation()
            metrics[subset.name] = {
                key: float(aggregation[key.rpartition(",")[0]](list(column)))
                for key, column in values.items()
            }
            samples[subset.name] = SampleScores(doc_ids=subset.doc_ids, values=values)
        return Scores(
            metrics=metrics,
            samples=samples,
            forward_seconds=self._watch.seconds,
            counts={"generations": self._watch.generations, "truncated": self._watch.truncated},
        )

    def _score(self, subset: DocumentSet) -> dict[str, tuple[float, ...]]:
        task = self._library.tasks[subset.task]
        prepared = self._prepare(subset)
        by_type: dict[str, list[Any]] = {}
        for instance in prepared.instances:
            instance.resps, instance.filtered_resps = [], {}
            by_type.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        for request_type, requests in by_type.items():
            responses = getattr(self._lm, request_type)(requests, disable_tqdm=True)
            for instance, response in zip(requests, responses, strict=True):
                instance.resps.append(response)
        for pipeline in task._filters:
            pipeline.apply(prepared.instances)
        wanted = self._metrics[subset.name]
        columns: dict[str, list[float]] = {f"{metric},{name}": [] for metric, name in wanted}
        for name in dict.fromkeys(name for _, name in wanted):
            for document, instances in prepared.per_document:
                found = task.process_results(document, [item.filtered_resps[name] for item in instances])
                for metric in (metric for metric, its_filter in wanted if its_filter == name):
                    columns[f"{metric},{name}"].append(_number(found, metric, subset.task))
        return {key: tuple(column) for key, column in columns.items()}

    def _prepare(self, subset: DocumentSet) -> _Prepared:
        if subset not in self._prepared:
            task, settings = self._library.tasks[subset.task], self._settings
            default = task.get_config("num_fewshot")
            if settings.num_fewshot is not None and default != 0:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
            elif default is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            chat = settings.apply_chat_template
            task.build_all_requests(
                samples=None if subset.complete else list(subset.doc_ids),
                system_instruction=settings.system_instruction,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=self._lm.apply_chat_template if chat else None,
                tokenizer_name=self._lm.tokenizer_name if chat else "",
            )
            groups: dict[int, list[Any]] = {}
            for instance in task.instances:
                groups.setdefault(instance.doc_id, []).append(instance)
            self._prepared[subset] = _Prepared(
                instances=list(task.instances),
                per_document=[
                    (group[0].doc, sorted(group, key=lambda instance: int(instance.idx)))
                    for group in groups.values()
                ],
            )
        return self._prepared[subset]


class _Watch:
    """Times forward passes, checks their logits, and counts generations that ran into the token limit."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds = 0.0
        self.generations = 0
        self.truncated = 0

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            logits: Tensor = output.logits
            if logits.is_cuda:
                import torch

                torch.cuda.current_stream(logits.device).synchronize()
            self.seconds += time.perf_counter() - started
            if not logits.isfinite().all():
                raise NonFiniteLogitsError("the model's logits hold NaN or infinity")

        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    watch: _Watch,
) -> Any:
    """Put lm-eval's own wrapper around the live model, extended by a count of truncated generations."""
    from lm_eval.models.huggingface import HFLM

    class WatchedModel(HFLM):  # type: ignore[misc]
        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
            output: Tensor = super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
            watch.generations += len(output)
            if output.shape[1] >= max_length:
                texts = self.tokenizer.batch_decode(output[:, context.shape[1] :], skip_special_tokens=False)
                watch.truncated += sum(not any(end in text for end in stop) for text in texts)
            return output

    with _quiet():
        return WatchedModel(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size(settings),
            max_length=settings.max_length,
            softmax_dtype=settings.softmax_dtype,
        )


def batch_size(settings: EvaluationSettings) -> int:
    """The batch size that the settings mean."""
    return AUTO_BATCH_SIZE if settings.batch_size == "auto" else settings.batch_size


def stock_command(
    documents: DocumentSet,
    model: Path,
    library: TaskLibrary,
    settings: EvaluationSettings,
    *,
    dtype: str,
    device: str,
    threads: int,
) -> str:
    """The stock `lm_eval` command that scores an exported model on the same documents."""
    arguments = {"pretrained": str(model), "dtype": dtype, "softmax_dtype": settings.softmax_dtype}
    if settings.max_length is not None:
        arguments["max_length"] = str(settings.max_length)
    if settings.attention is not None:
        arguments["attn_implementation"] = settings.attention
    parts = [
        f"cd {library.folders[documents.task]} &&",
        f"OMP_NUM_THREADS={threads} lm_eval run --model hf",
        "--model_args " + ",".join(f"{key}={value}" for key, value in arguments.items()),
        f"--tasks {documents.task} --include_path .",
        f"--device {device} --batch_size {batch_size(settings)}",
    ]
    if settings.num_fewshot is not None:
        parts.append(f"--num_fewshot {settings.num_fewshot}")
    if settings.apply_chat_template:
        parts.append("--apply_chat_template")
    if settings.system_instruction is not None:
        parts.append(f"--system_instruction {json.dumps(settings.system_instruction, ensure_ascii=False)}")
    if not documents.complete:
        samples = json.dumps({documents.task: list(documents.doc_ids)}, separators=(",", ":"))
        parts.append(f"--samples '{samples}'")
    return " ".join(parts)


def split_documents(
    name: str, count: int, *, holdout: float, limit: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a task's documents into search and holdout ones, the same way in every run.

    Documents are ordered by a hash of task name and position. The holdout takes the first share of that
    order, the search set the rest or its first `limit`.

    Returns:
        Ascending document ids of the search set and of the holdout.
    """
    order = sorted(
        range(count), key=lambda index: hashlib.blake2b(f"{name}\n{index}".encode(), digest_size=8).digest()
    )
    num_holdout = min(count - 1, max(1, round(count * holdout))) if holdout > 0 and count > 1 else 0
    searched = order[num_holdout:][:limit]
    return tuple(sorted(searched)), tuple(sorted(order[:num_holdout]))


def _number(found: Mapping[str, Any], metric: str, task: str) -> float:
    value = found.get(metric)
    if isinstance(value, (list, tuple, dict, str)) or value is None:
        reason = f"does not give one number per document (got {type(value).__name__}); choose another metric"
        raise TaskError(Fault(path=f"{task}: {metric}", reason=reason))
    return float(value)


def _stable(config: Any) -> Any:
    """A task's config without what differs between machines: where its file lies, and functions' addresses."""
    if isinstance(config, dict):
        return {
            key: _stable(value)
            for key, value in config.items()
            if key not in ("metadata", "data_files", "num_fewshot")
        }
    if isinstance(config, (list, tuple)):
        return [_stable(item) for item in config]
    if callable(config):
        return getattr(config, "__name__", "function")
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' progress bars off the terminal."""
    import datasets

    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(_Discard()), contextlib.redirect_stdout(_Discard()):
            yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


class _Discard:
    """A text stream that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return False
