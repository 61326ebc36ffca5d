"""What scoring asks of a model: the tokens of the tasks' own prompts, in batches as lm-eval forms them.

Requests of one kind are sorted by length, the longest first, and each batch is padded to its longest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evomerge.checkpoints.reader import Checkpoint
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.likelihood import likelihood_requests
from evomerge.fitness.metrics import LIKELIHOOD
from evomerge.fitness.reading import Reader, new_tokens, open_reader, per_document
from evomerge.fitness.stock import batch_size
from evomerge.plan.records import Span

SHORTEST_ANSWER = 1 / 8
"""Least share of the token limit that the longest answer of a batch takes, however short the task's own are: the
model thinks aloud, or does not stop."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts that go through the model together.

    Attributes:
        rows: Number of prompts.
        length: Tokens of the longest.
        new: Tokens generated after them; 0 for prompts that are only judged.
    """

    rows: int
    length: int
    new: Span


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A prompt: what is sorted and batched together, its tokens, and those generated after it."""

    group: str
    length: int
    new: Span


@dataclass(frozen=True, kw_only=True)
class TaskLoad:
    """What scoring some documents asks of a model.

    Attributes:
        requests: Number of prompts.
        prompt_tokens: Their tokens, without padding.
        new_tokens: Tokens generated, if every answer is as long as the task's own and if none ends by itself.
        batches: The batches.
        groups: The prompts that are batched together, where they are kept to be batched anew.
    """

    requests: int
    prompt_tokens: int
    new_tokens: Span
    batches: tuple[Batch, ...]
    groups: tuple[tuple[_Prompt, ...], ...] = field(default=(), compare=False, repr=False)

    def in_batches_of(self, size: int) -> TaskLoad:
        """The same in batches of another size, without counting tokens again."""
        return replace(self, batches=tuple(batch for group in self.groups for batch in _batches(group, size)))

    def __add__(self, other: TaskLoad) -> TaskLoad:
        return TaskLoad(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            new_tokens=self.new_tokens + other.new_tokens,
            batches=self.batches + other.batches,
            groups=self.groups + other.groups,
        )


NOTHING = TaskLoad(requests=0, prompt_tokens=0, new_tokens=Span(low=0, high=0), batches=())


def total_load(
    documents: Iterable[DocumentSet],
    library: TaskLibrary,
    metrics: Mapping[str, Sequence[tuple[str, str]]],
    settings: EvaluationSettings,
    donor: Checkpoint,
) -> TaskLoad:
    """What scoring documents asks of a model.

    Args:
        documents: The documents.
        library: Their tasks.
        metrics: Task as the objectives name it -> the (metric, filter) pairs wanted.
        settings: How they are prompted.
        donor: The model that gives the tokenizer.
    """
    counter = _Counter(open_reader(donor.folder, settings), settings)
    loads = (counter.load(library, item, item.metrics or metrics[item.name]) for item in documents)
    return sum(loads, start=NOTHING)


class _Counter:
    def __init__(self, reader: Reader, settings: EvaluationSettings) -> None:
        self._reader = reader
        self._settings = settings

    def load(
        self, library: TaskLibrary, documents: DocumentSet, wanted: Sequence[tuple[str, str]]
    ) -> TaskLoad:
        """What the metrics wanted of some documents ask of a model."""
        chat, task = self._settings.apply_chat_template, library.tasks[documents.task]
        requests = library.requests(
            documents, self._settings, chat_template=self._reader.render if chat else None
        )
        prompts: list[_Prompt] = []
        if LIKELIHOOD in wanted:
            references = likelihood_requests(task, per_document(requests), chat=chat)
            found = self._judged(task, [reference.instance for reference in references])
            prompts += (replace(prompt, group="likelihood") for prompt in found)
        if any(pair != LIKELIHOOD for pair in wanted):
            prompts += self._prompts(task, requests)
        groups: dict[str, list[_Prompt]] = {}
        for prompt in prompts:
            groups.setdefault(prompt.group, []).append(prompt)
        load = TaskLoad(
            requests=len(prompts),
            prompt_tokens=sum(prompt.length for prompt in prompts),
            new_tokens=sum((prompt.new for prompt in prompts), start=Span(low=0, high=0)),
            batches=(),
            groups=tuple(map(tuple, groups.values())),
        )
        return load.in_batches_of(batch_size(self._settings))

    def _prompts(self, task: Any, requests: Sequence[Any]) -> Iterator[_Prompt]:
        kinds: dict[str, list[Any]] = {}
        for request in requests:
            kinds.setdefault(request.request_type, []).extend([request] * request.repeats)
        for kind, found in kinds.items():
            count: Callable[[Any, Sequence[Any]], Iterator[_Prompt]] = {
                "generate_until": self._generated,
                "loglikelihood": self._judged,
            }.get(kind, self._rolled)
            yield from count(task, found)

    def _generated(self, task: Any, requests: Sequence[Any]) -> Iterator[_Prompt]:
        lengths = [len(ids) for ids in self._reader.ids([request.args[0] for request in requests])]
        answers = self._reader.ids([_answer(task, request.doc) for request in requests])
        for request, length, answer in zip(requests, lengths, answers, strict=True):
            options = request.args[1]
            most = new_tokens(options)
            # One more for the token that ends it.
            least = min(most, len(answer) + 1)
            group = json.dumps(options, sort_keys=True, default=str)
            yield _Prompt(group=group, length=length, new=Span(low=least, high=most))

    def _judged(self, _task: Any, requests: Sequence[Any]) -> Iterator[_Prompt]:
        found = self._reader.ids(["".join(request.args) for request in requests])
        # lm-eval runs continuations of one token after the same context as one.
        for ids in dict.fromkeys(tuple(ids[:-1]) for ids in found):
            yield _Prompt(group="judged", length=max(1, len(ids)), new=Span(low=0, high=0))

    def _rolled(self, _task: Any, requests: Sequence[Any]) -> Iterator[_Prompt]:
        """Whole texts, in windows as long as the model reads."""
        for ids in self._reader.ids([request.args[0] for request in requests]):
            for first in range(0, max(1, len(ids)), self._reader.max_length):
                length = max(1, min(self._reader.max_length, len(ids) - first))
                yield _Prompt(group="rolled", length=length, new=Span(low=0, high=0))


def _batches(prompts: Sequence[_Prompt], size: int) -> Iterator[Batch]:
    ordered = sorted(prompts, key=lambda prompt: -prompt.length)
    for first in range(0, len(ordered), size):
        rows = ordered[first : first + size]
        most = max(prompt.new.high for prompt in rows)
        longest = max(prompt.new.low for prompt in rows)
        yield Batch(
            rows=len(rows),
            length=rows[0].length,
            new=Span(low=min(most, max(longest, most * SHORTEST_ANSWER)), high=most),
        )


def _answer(task: Any, document: Mapping[str, Any]) -> str:
    """The task's own answer; of several the longest."""
    target = task.doc_to_target(document)
    if isinstance(target, list):
        return max(map(str, target), key=len, default="")
    return str(target)
