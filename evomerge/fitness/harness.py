"""lm-eval over a live model: the only module that imports lm_eval.

lm-eval's own entry point rebuilds every prompt and collects environment information at each call. Here tasks
are loaded once, prompts are built once per document set, and a call only resets the responses, runs the
requests and lets the task's own filters and metrics judge them. The scores of exact document sets equal those of
the stock `lm_eval` command for the same model, documents and settings, as the requests and their order do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import Fault, TaskError, nearest
from evomerge.experiment import ConstraintSettings, EvaluationSettings, ObjectiveSettings
from evomerge.fitness.base import DocumentSet, Scores
from evomerge.fitness.fingerprint import stable
from evomerge.fitness.likelihood import LikelihoodRequest, check_references, likelihood_requests
from evomerge.fitness.load_faults import unreadable_file, why_not_loaded
from evomerge.fitness.metrics import (
    LIKELIHOOD,
    OUTPUT_TOKENS,
    aggregated,
    judged,
    mean_metrics,
    measure,
)
from evomerge.fitness.objectives import BUILT_IN, Measure, Objective
from evomerge.fitness.own import OwnScorer, Subject
from evomerge.fitness.quiet import quiet
from evomerge.fitness.stock import batch_size
from evomerge.fitness.tallies import audit_metrics, check_language, tally
from evomerge.fitness.task_code import refuse_code
from evomerge.fitness.watch import Watch
from evomerge.records import SampleScores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWSHOT_SEED = 1234
"""lm-eval's default, so that the stock command draws the same examples."""


class TaskLibrary:
    """The lm-eval tasks of an experiment, loaded once.

    Args:
        names: Tasks to load.
        include_path: Folders with task files, beside those that lm-eval ships.
        allow_code: Whether task files other than lm-eval's and evomerge's own may run Python code.
        data_dir: Folder with data sets as their authors publish them, for tasks that can read them.

    Raises:
        TaskError: Carries every fault found.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: Sequence[Path],
        *,
        allow_code: bool,
        data_dir: str | None = None,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.tasks: dict[str, Any] = {}
        self.files: dict[str, Path] = {}
        if not allow_code:
            _sandbox_templates()
        _remember_templates()
        for folder in include_path:
            if not folder.is_dir():
                reason = f"no such folder: {folder}"
                raise TaskError(Fault(path="evaluation.include_path", reason=reason))
        if data_dir is not None and not Path(data_dir).is_dir():
            raise TaskError(Fault(path="evaluation.data_dir", reason=f"no such folder: {data_dir}"))
        # What lm-eval's --metadata would give: keyword arguments of a task's custom_dataset.
        self._metadata = None if data_dir is None else {"data_dir": data_dir}
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

        folders: list[str | Path] = [str(path) for path in include_path]
        own = TaskManager(include_path=folders, include_defaults=False, metadata=self._metadata)
        if all(name in own.all_tasks for name in names):
            return own
        for name in names:
            reason = None if name in own.all_tasks else unreadable_file(name, include_path)
            if reason is not None:
                raise TaskError(Fault(path=name, reason=reason))
        # Reading lm-eval's thousands of task files takes seconds, so only when they are needed.
        return TaskManager(include_path=folders, include_defaults=True, metadata=self._metadata)

    def _load(self, name: str, index: Any, include_path: Sequence[Path], *, allow_code: bool) -> None:
        from lm_eval.tasks._yaml_loader import load_yaml

        if name not in index.all_tasks:
            where = ", ".join(str(path) for path in include_path) or "none given"
            reason = f"no such task{nearest(name, index.all_tasks)}; looked in lm-eval's own tasks and in "
            reason += f"evaluation.include_path ({where})"
            raise TaskError(Fault(path=name, reason=reason))
        entry = index.task_index[name]
        if name not in index.all_subtasks:
            members = ", ".join(sorted(entry.tags)) or "see its file"
            raise TaskError(Fault(path=name, reason=f"a group of tasks ({members}); name single tasks"))
        file = Path(entry.yaml_path)
        if not allow_code:
            refuse_code(name, file, trusted=_package_folder(), metrics=_known_metrics())
        try:
            # Relative data files are meant relative to the task's file; datasets resolves them against cwd.
            with contextlib.chdir(file.parent), quiet():
                self.tasks[name] = index.load([name])["tasks"][name]
        except TaskError:
            raise
        except Exception as error:  # lm-eval and datasets raise whatever comes
            config = load_yaml(file, resolve_func=False)
            raise TaskError(Fault(path=name, reason=why_not_loaded(file, config, error))) from error
        self.files[name] = file
        check_language(name, self.tasks[name])

    def num_documents(self, name: str) -> int:
        """Number of documents in the task's evaluation set."""
        return len(self.tasks[name].eval_docs)

    def split_name(self, name: str) -> str:
        """What decides the split of a task's documents: `documents` in its metadata, or its own name.

        Tasks over the same problems, in other languages or prompts, share it, so that what one searches on
        another does not hold out.
        """
        metadata = self.tasks[name].config.metadata or {}
        return str(metadata.get("documents", name))

    def fingerprint(self, name: str) -> str:
        """Hash of the task's documents and of how they are prompted and judged."""
        task = self.tasks[name]
        digest = hashlib.sha256()
        digest.update(json.dumps(stable(task.dump_config()), sort_keys=True, default=str).encode())
        examples = task.fewshot_docs() if self._has_examples(task) else ()
        for document in itertools.chain(task.eval_docs, ["examples"], examples):
            digest.update(json.dumps(document, sort_keys=True, default=str, ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    def requests(
        self,
        subset: DocumentSet,
        settings: EvaluationSettings,
        *,
        chat_template: Callable[..., str] | None = None,
        tokenizer_name: str = "",
    ) -> list[Any]:
        """Build lm-eval's requests for a document set, in lm-eval's own order.

        Args:
            subset: The documents.
            settings: How they are prompted.
            chat_template: Renders a conversation, if the settings ask for the chat template.
            tokenizer_name: What lm-eval calls the tokenizer of that template.
        """
        task = self.tasks[subset.task]
        default = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with quiet():
            task.build_all_requests(
                samples=None if subset.complete else list(subset.doc_ids),
                system_instruction=settings.system_instruction,
                apply_chat_template=chat_template is not None,
                fewshot_as_multiturn=chat_template is not None,
                chat_template=chat_template,
                tokenizer_name=tokenizer_name,
            )
        task.set_config(key="num_fewshot", value=default)
        return list(task.instances)

    def measure(self, task: str, settings: ObjectiveSettings | ConstraintSettings, where: str) -> Measure:
        """Look up the metric that an entry of the experiment asks of a task; see `metrics.measure`.

        Raises:
            TaskError: The task has no such metric or filter.
        """
        return measure(task, self.tasks[task], settings, where)

    def check_references(self, task: str, where: str) -> None:
        """Make sure that every document of a task has a reference answer; see `likelihood.check_references`.

        Raises:
            TaskError: It has none for some document.
        """
        check_references(task, self.tasks[task], where)

    def objective(self, settings: ObjectiveSettings, position: int) -> Objective:
        """Fill in what the experiment left to the task, for the objective at `position`.

        Raises:
            TaskError: The task has no such metric or filter.
        """
        found = self.measure(settings.task, settings, f"objectives.{position}")
        return Objective(**asdict(found), weight=settings.weight, normalize=settings.normalize == "sources")

    def _has_examples(self, task: Any) -> bool:
        """Whether prompts may hold examples; 0 in a task file is final, and no number leaves it open."""
        return bool(task.get_config("num_fewshot") != 0)

    def metrics(self, name: str) -> list[tuple[str, str]]:
        """Every (metric, filter) of its own of a task whose metric is the mean of a number per document.

        Raises:
            TaskError: It has none.
        """
        task = self.tasks[name]
        means = mean_metrics(task)
        if not means:
            found = ", ".join(task.aggregation())
            raise TaskError(
                Fault(path=name, reason=f"no metric is the mean of a number per document, only {found}")
            )
        return [(metric, str(pipeline.name)) for pipeline in task._filters for metric in means]


def _package_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent


def _known_metrics() -> set[str]:
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api import registry

    return set(registry.metric_registry)


def _sandbox_templates() -> None:
    """Let lm-eval render templates in Jinja's sandbox: the same text, without all of Python in reach."""
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    if not isinstance(lm_eval.utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
        )
        sandbox.filters.update(lm_eval.utils.env.filters)
        lm_eval.utils.env = sandbox


def _remember_templates() -> None:
    """Let lm-eval compile a template once, not once per document and candidate."""
    import lm_eval.utils

    environment = lm_eval.utils.env
    if not hasattr(environment.from_string, "cache_info"):
        environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Requests of one document set: instances in request order, and grouped per document."""

    instances: list[Any]
    per_document: list[tuple[Any, list[Any]]]

    def texts(self) -> list[list[str]]:
        """What the model said on every document."""
        return [[str(text) for item in group for text in item.resps] for _, group in self.per_document]


class HarnessEvaluator:
    """Scores one live model with lm-eval's tasks.

    Args:
        model: The model; its present weights are scored at every call.
        tokenizer: Its tokenizer.
        library: The loaded tasks.
        metrics: Task as the objectives name it -> the (metric, filter) pairs wanted.
        settings: How to score.
        own: Task as the objectives name it and metric -> the function or judge of the user's that scores it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        library: TaskLibrary,
        metrics: Mapping[str, Sequence[tuple[str, str]]],
        settings: EvaluationSettings,
        own: Mapping[tuple[str, str], OwnScorer] | None = None,
    ) -> None:
        self._library = library
        self._own = own or {}
        self._metrics = metrics
        self._settings = settings
        self._prepared: dict[DocumentSet, _Prepared] = {}
        self._references: dict[DocumentSet, list[LikelihoodRequest]] = {}
        self._watch = Watch()
        self._tallies: Counter[str] = Counter()
        self._lm = _wrap(model, tokenizer, settings, self._watch)

    def evaluate(self, documents: Sequence[DocumentSet]) -> Scores:
        """Score the model's present weights, one task at a time, in lm-eval's own request order.

        Raises:
            NonFiniteLogitsError: The model's logits are not finite.
            TaskError: A metric does not give one number per document.
            FitnessError: A function or judge of the user's has no score for the model.
            UnavailableError: A judge cannot be asked.
        """
        self._watch.reset()
        self._tallies.clear()
        metrics: dict[str, dict[str, float]] = {}
        samples: dict[str, SampleScores] = {}
        for subset in documents:
            with quiet(), self._watch.on(self._lm.model):
                values = self._score(subset)
            metrics[subset.name] = aggregated(self._library.tasks[subset.task], values)
            samples[subset.name] = SampleScores(doc_ids=subset.doc_ids, values=values)
        return Scores(
            metrics=metrics,
            samples=samples,
            forward_seconds=self._watch.seconds,
            counts={
                "generations": self._watch.generations,
                "truncated": self._watch.truncated,
                "output_tokens": self._watch.output_tokens,
                **self._tallies,
            },
        )

    def _score(self, subset: DocumentSet) -> dict[str, tuple[float, ...]]:
        self._lm.exact = subset.exact
        wanted = subset.metrics or self._metrics[subset.name]
        columns: dict[tuple[str, str], Sequence[float]] = {}
        if LIKELIHOOD in wanted:
            columns[LIKELIHOOD] = self._likelihoods(subset)
        own = [pair for pair in wanted if pair[1] != BUILT_IN]
        users_own = {
            pair: self._own[subset.name, pair[0]] for pair in wanted if self._is_users_own(subset, pair)
        }
        if own or OUTPUT_TOKENS in wanted or any(scorer.reads_text for scorer in users_own.values()):
            prepared = self._prepare(subset)
            self._respond(prepared)
            task, found = self._library.tasks[subset.task], prepared.per_document
            columns |= judged(task, found, list(dict.fromkeys([*own, *audit_metrics(task, own)])))
            if task.OUTPUT_TYPE == "generate_until":
                columns[OUTPUT_TOKENS] = self._lengths(prepared)
                self._tallies.update(tally(task, found, columns, own))
        # Who is given the model comes last.
        for pair, scorer in sorted(users_own.items(), key=lambda item: not item[1].reads_text):
            columns[pair] = self._marks(subset, scorer)
        return {f"{metric},{name}": tuple(columns[metric, name]) for metric, name in wanted}

    def _is_users_own(self, subset: DocumentSet, pair: tuple[str, str]) -> bool:
        return pair[1] == BUILT_IN and (subset.name, pair[0]) in self._own

    def _marks(self, subset: DocumentSet, scorer: OwnScorer) -> Sequence[float]:
        """What a function or judge of the user's says of the model."""
        prepared = self._prepare(subset)
        marks = scorer.score(
            Subject(
                task=self._library.tasks[subset.task],
                documents=[document for document, _ in prepared.per_document],
                texts=prepared.texts() if scorer.reads_text else (),
                model=self._lm.model,
                tokenizer=self._lm.tokenizer,
            )
        )
        self._tallies.update(marks.counts)
        return marks.values

    def _respond(self, prepared: _Prepared) -> None:
        """Have the model answer every request."""
        by_type: dict[str, list[Any]] = {}
        for instance in prepared.instances:
            instance.resps, instance.filtered_resps = [], {}
            by_type.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        for request_type, requests in by_type.items():
            responses = getattr(self._lm, request_type)(requests, disable_tqdm=True)
            for instance, response in zip(requests, responses, strict=True):
                instance.resps.append(response)

    def _lengths(self, prepared: _Prepared) -> list[float]:
        """Mean number of tokens of what the model said on each document.

        Counted in the text that is left when lm-eval has cut it where it ends: how far a model goes on behind
        that depends on the others of its batch.
        """
        texts = prepared.texts()
        encoded = self._lm.tokenizer([text for each in texts for text in each], add_special_tokens=False)
        lengths = iter([len(ids) for ids in encoded["input_ids"]])
        per_document = [[next(lengths) for _ in each] for each in texts]
        self._watch.output_tokens += sum(map(sum, per_document))
        return [sum(each) / len(each) for each in per_document]

    def _likelihoods(self, subset: DocumentSet) -> list[float]:
        """How likely the model finds each document's answer.

        Raises:
            TaskError: An answer is longer than the model's context.
        """
        key = replace(subset, metrics=None)
        if key not in self._references:
            chat = self._settings.apply_chat_template
            task, documents = self._library.tasks[subset.task], self._prepare(subset).per_document
            requests = likelihood_requests(task, documents, chat=chat)
            for doc_id, request in zip(subset.doc_ids, requests, strict=True):
                length = len(self._lm.tok_encode(request.instance.args[1], add_special_tokens=False))
                if length > self._lm.max_length:
                    reason = f"the answer has {length} tokens, the model reads {self._lm.max_length} at most"
                    raise TaskError(Fault(path=f"{subset.task}: document {doc_id}", reason=reason))
            self._references[key] = requests
        requests = self._references[key]
        answers = self._lm.loglikelihood([request.instance for request in requests], disable_tqdm=True)
        return [request.score(logprob) for request, (logprob, _) in zip(requests, answers, strict=True)]

    def _prepare(self, subset: DocumentSet) -> _Prepared:
        key = replace(subset, metrics=None)
        if key not in self._prepared:
            chat = self._settings.apply_chat_template
            instances = self._library.requests(
                subset,
                self._settings,
                chat_template=self._lm.apply_chat_template if chat else None,
                tokenizer_name=self._lm.tokenizer_name if chat else "",
            )
            groups: dict[int, list[Any]] = {}
            for instance in instances:
                groups.setdefault(instance.doc_id, []).append(instance)
            # lm-eval takes chosen documents in ascending order and numbers them anew, from 0.
            assert list(groups) == list(range(len(subset.doc_ids)))
            self._prepared[key] = _Prepared(
                instances=instances,
                per_document=[
                    (group[0].doc, sorted(group, key=lambda instance: int(instance.idx)))
                    for group in groups.values()
                ],
            )
        return self._prepared[key]


def _wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    watch: Watch,
) -> Any:
    """Put lm-eval's own wrapper around the live model, extended by a count of truncated generations."""
    from lm_eval.models.huggingface import HFLM

    from evomerge.fitness.search_model import SearchModel

    class WatchedModel(SearchModel, HFLM):  # type: ignore[misc]
        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
            output: Tensor = super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
            watch.generations += len(output)
            if output.shape[1] >= max_length:
                texts = self.tokenizer.batch_decode(output[:, context.shape[1] :], skip_special_tokens=False)
                watch.truncated += sum(not any(end in text for end in stop) for text in texts)
            return output

    with quiet():
        return WatchedModel(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size(settings),
            max_length=settings.max_length,
            softmax_dtype=settings.softmax_dtype,
        )
