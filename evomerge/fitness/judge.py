"""Has another model mark what candidates say: a judge behind an HTTP server.

The prompt is a Jinja template, rendered in its sandbox, over the fields of the document and

    generation   what the model said
    target       the task's reference answer
    document     the document, for fields that have one of these names

The mark is the last number of the reply, and what names the scale ("/10", "out of 10", "from 1 to 10") is no mark.
Scores are shares of the way from the scale's lowest mark to its highest. A reply without a mark on the scale counts
as the worst mark and is counted as unreadable. The same question is asked once by each worker: candidates often say
the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigurationError, Fault, FitnessError, TaskError, nearest
from evomerge.fitness.chat_client import ChatClient, Reply
from evomerge.fitness.likelihood import reference
from evomerge.fitness.own import Marks, Subject
from evomerge.measure_settings import JudgeSettings

if TYPE_CHECKING:
    from jinja2 import Template

FEWEST = 4
"""Questions of which one must be answered with a mark, lest a judge that never gives one rule a search."""

NUMBER = re.compile(r"(?<![A-Za-z_\d.,])[-−]?(?:\d+(?:[.,]\d+)?|\.\d+)(?![A-Za-z_\d])")
RESERVED = ("generation", "target", "document")


def make_client(settings: JudgeSettings) -> ChatClient:
    """The client of a judge, with the key from the environment.

    Raises:
        ConfigurationError: The key is missing or cannot be one.
    """
    return ChatClient(
        url=settings.url,
        model=settings.model,
        key=read_key(settings),
        variable=settings.api_key_env,
        max_tokens=settings.max_tokens,
        timeout=settings.timeout,
        retries=settings.retries,
    )


def read_key(settings: JudgeSettings) -> str | None:
    """The key of a judge, or None where it wants none.

    Raises:
        ConfigurationError: The variable is not set, or holds no key.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        reason = f"the environment variable {settings.api_key_env} is not set; it has to hold the judge's key"
        raise ConfigurationError(Fault(path="judge.api_key_env", reason=reason))
    if not (key.isascii() and key.isprintable()):
        reason = f"what the environment variable {settings.api_key_env} holds cannot be a key"
        raise ConfigurationError(Fault(path="judge.api_key_env", reason=reason))
    return key


class Judge:
    """Marks generations.

    Args:
        settings: The judge.
        client: Asks it.
        maximize: Whether high marks are good.
    """

    reads_text = True

    def __init__(self, settings: JudgeSettings, client: ChatClient, *, maximize: bool) -> None:
        self._settings = settings
        self._client = client
        self._worst = 0.0 if maximize else 1.0
        self._known: dict[bytes, float | None] = {}

    def score(self, subject: Subject) -> Marks:
        """Marks of everything the model said; see `OwnScorer.score`.

        Raises:
            FitnessError: No reply has a mark.
            UnavailableError: The judge cannot be asked, or takes no question.
        """
        questions = [
            render(self._settings.prompt, subject.task, document, text) for document, text in subject.said()
        ]
        keys = [hashlib.blake2b(question.encode(), digest_size=16).digest() for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        replies = self._ask(list(new.values()))
        refused = [reply.refused for reply in replies if reply.refused]
        # One that has marked before is there; what it refuses now is about these questions.
        has_marked = any(mark is not None for mark in self._known.values())
        if len(refused) == len(replies) >= FEWEST and not has_marked:
            raise self._client.unavailable(f"{refused[0]}, to each of {len(refused)} questions")
        marks = [None if reply.refused else read_mark(reply.text, self._settings.scale) for reply in replies]
        if len(questions) >= FEWEST and all(
            {**self._known, **dict(zip(new, marks, strict=True))}[key] is None for key in keys
        ):
            self._complain(len(set(keys)), replies)
        self._known.update(zip(new, marks, strict=True))
        low, high = self._settings.scale
        values = []
        for key in keys:
            mark = self._known[key]
            values.append(self._worst if mark is None else (mark - low) / (high - low))
        unreadable = sum(self._known[key] is None for key in keys)
        counts = {"judged": len(keys), "unreadable": unreadable}
        return Marks(values=subject.per_document(values), counts=counts)

    def _complain(self, count: int, replies: Sequence[Reply]) -> None:
        low, high = self._settings.scale
        example = ""
        if replies:
            said = replies[0].refused or re.sub(r"\s+", " ", replies[0].text)[:200]
            example = f"; the first: {said!r}"
        raise FitnessError(
            f"{self._settings.label}: none of {count} replies has a mark from {low:g} to {high:g}{example}"
        )

    def _ask(self, questions: Sequence[str]) -> list[Reply]:
        """Ask several questions at a time; the first that cannot be asked ends it."""
        if not questions:
            return []
        given_up = threading.Event()
        threads = ThreadPoolExecutor(max_workers=min(self._settings.concurrency, len(questions)))
        try:
            asked = [threads.submit(self._client.ask, question, given_up) for question in questions]
            done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            for future in done:
                if future.exception() is not None:
                    given_up.set()
                    threads.shutdown(cancel_futures=True)
                    future.result()
            return [future.result() for future in asked]
        finally:
            given_up.set()
            threads.shutdown(wait=False, cancel_futures=True)


def read_mark(text: str, scale: tuple[float, float]) -> float | None:
    """The mark that a reply gives, or None if it gives none on the scale.

    Args:
        text: The reply.
        scale: Lowest and highest mark.
    """
    low, high = (re.escape(f"{bound:g}") for bound in scale)
    text = re.sub(rf"(?<![\w.]){low}\s*(?:-|–|to|through|and)\s*{high}\b", " ", text)
    text = re.sub(rf"(?:out of|(?<=\d)\s*(?:/|of))\s*{high}(?:\.0+)?(?!\d)|(?<!\d){high}点満点", " ", text)
    found = NUMBER.findall(text)
    if not found:
        return None
    mark = float(found[-1].replace(",", ".").replace("−", "-"))
    return mark if scale[0] <= mark <= scale[1] else None


def render(prompt: str, task: Any, document: Mapping[str, Any], generation: str) -> str:
    """The question about a generation.

    Raises:
        ValueError: The document has no reference answer, and the prompt asks for it.
        jinja2.TemplateError: The document lacks a field.
    """
    template, names = _template(prompt)
    own = {"generation": generation, "document": dict(document)}
    if "target" in names:
        own["target"] = reference(task, document).text
    return template.render({**document, **own})


def check_prompt(name: str, task: Any, settings: JudgeSettings, where: str) -> None:
    """Make sure that a judge can be asked about every document of a task.

    Args:
        name: The task's name.
        task: The task.
        settings: The judge.
        where: Where its prompt stands in the experiment.

    Raises:
        TaskError: The prompt is no template, does not show the generation, or needs what a document lacks.
    """
    import jinja2

    try:
        _, names = _template(settings.prompt)
    except jinja2.TemplateError as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TaskError(Fault(path=where, reason=f"not a valid template{line}: {error}")) from None
    if "generation" not in names:
        reason = "the judge has to see what the model said; put {{generation}} into the prompt"
        raise TaskError(Fault(path=where, reason=reason))
    for position, document in enumerate(task.eval_docs):
        try:
            render(settings.prompt, task, document, "")
        except Exception as error:  # templates raise whatever comes
            unknown = sorted(names - {*document, *RESERVED})
            hint = nearest(unknown[0], [*document, *RESERVED]) if unknown else ""
            fields = ", ".join([*RESERVED, *document])
            reason = (
                f"cannot be filled in for document {position} of {name}: {error}{hint}; there are {fields}"
            )
            raise TaskError(Fault(path=where, reason=reason)) from None


@cache
def _template(prompt: str) -> tuple[Template, frozenset[str]]:
    """A compiled prompt, and the names it uses."""
    from jinja2 import StrictUndefined, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    names = meta.find_undeclared_variables(environment.parse(prompt))
    return environment.from_string(prompt), frozenset(names)
