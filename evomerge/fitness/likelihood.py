"""The likelihood of reference answers: a score that is smooth in the weights and costs no generation.

A document's score is log p(answer | prompt) / bytes: the log-probability, natural, that the model gives to the
task's reference answer behind the very prompt it would be asked to go on from, divided by the answer's length in
UTF-8 bytes, so that models with different tokenizers and documents with answers of different lengths compare.
It is at most 0. Like lm-eval's `acc_bytes`, the delimiter between prompt and answer counts as part of the answer
in the probability, not in the length.

The requests are lm-eval's and answered by lm-eval's own `loglikelihood`; nothing here imports it. Tasks are its
`ConfigurableTask`s, instances its `Instance`s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evomerge.errors import Fault, TaskError
from evomerge.fitness.base import NonFiniteLogitsError

TYPES = ("generate_until", "multiple_choice", "loglikelihood")
"""Kinds of task, as lm-eval calls them, whose documents have a prompt with an answer to it."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The right answer of a document.

    Attributes:
        text: The answer; of several accepted ones the first, as in lm-eval's few-shot examples.
        choice: Its position among the document's choices, or None where the answer is free text.
    """

    text: str
    choice: int | None = None


@dataclass(frozen=True, kw_only=True)
class LikelihoodRequest:
    """One request for the log-probability of an answer.

    Attributes:
        instance: lm-eval's request, whose arguments are prompt and answer.
        num_bytes: Length of the answer in UTF-8, without the delimiter before it.
    """

    instance: Any
    num_bytes: int

    def score(self, logprob: float) -> float:
        """Log-probability per byte.

        Raises:
            NonFiniteLogitsError: The log-probability is not finite.
        """
        if not math.isfinite(logprob):
            raise NonFiniteLogitsError(f"the log-probability of an answer is {logprob}")
        return logprob / self.num_bytes


def check_references(name: str, task: Any, where: str) -> None:
    """Make sure that every document of a task has a reference answer.

    Args:
        name: The task's name.
        task: The task.
        where: The field that asks for the likelihood.

    Raises:
        TaskError: It has none for some document.
    """
    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind not in TYPES or getattr(task.config, "doc_to_target", None) is None:
        lack = f"is of type {kind}" if kind not in TYPES else "has no doc_to_target"
        reason = f"a likelihood needs a task that asks for answers and knows them, but {name} {lack}"
        raise TaskError(Fault(path=where, reason=reason))
    for position, document in enumerate(task.eval_docs):
        try:
            reference(task, document)
        except ValueError as error:
            reason = f"a likelihood needs an answer to every document, but document {position} of {name} has "
            reason += f"none: its doc_to_target {error}; repair the document or drop it (process_docs)"
            raise TaskError(Fault(path=where, reason=reason)) from None


def reference(task: Any, document: Mapping[str, Any]) -> Reference:
    """The right answer of a document.

    Raises:
        ValueError: It has none; says what its `doc_to_target` gives instead.
    """
    try:
        target = task.doc_to_target(document)
        choices = None if task.config.doc_to_choice is None else list(task.doc_to_choice(document))
        # Where the choices are different prompts with one answer, the text says which of them is right.
        chosen = task.doc_to_text(document) if task.multiple_input else target
    except Exception as error:  # templates and functions of a task raise whatever comes
        raise ValueError(f"cannot be made ({type(error).__name__}: {error})") from error
    if isinstance(target, (list, tuple)):
        target = target[0] if target else ""
    if isinstance(chosen, (list, tuple)):
        chosen = chosen[0] if chosen else ""
    choice = None
    if choices is not None and (task.OUTPUT_TYPE == "multiple_choice" or isinstance(chosen, int)):
        choice = _position(chosen, choices)
        if not task.multiple_input:
            target = choices[choice]
    text = "" if target is None else str(target)
    # A template writes a missing value out.
    if not text.strip() or (text == "None" and None in document.values()):
        raise ValueError("is empty")
    return Reference(text=text, choice=choice)


def _position(chosen: Any, choices: Sequence[Any]) -> int:
    """Where the right one of the choices stands."""
    if isinstance(chosen, str) and chosen in choices:
        return choices.index(chosen)
    if isinstance(chosen, int) and 0 <= chosen < len(choices):
        return chosen
    raise ValueError(f"is {chosen!r}, which is none of its {len(choices)} choices")


def likelihood_requests(
    task: Any, documents: Sequence[tuple[Mapping[str, Any], Sequence[Any]]], *, chat: bool
) -> list[LikelihoodRequest]:
    """Turn the requests of a task into those for the likelihood of its answers, one per document.

    Args:
        task: The task.
        documents: Every document with its instances, in the order of their `idx`.
        chat: Whether prompts are chat templates, which end in front of an answer as the model would write it.
    """
    found = []
    for document, instances in documents:
        answer = reference(task, document)
        if task.OUTPUT_TYPE == "generate_until":
            pair = (instances[0].args[0], _delimiter(task, chat=chat) + answer.text)
        else:
            pair = instances[answer.choice or 0].args[:2]
        instance = replace(
            instances[0], request_type="loglikelihood", arguments=pair, idx=0, resps=[], filtered_resps={}
        )
        found.append(LikelihoodRequest(instance=instance, num_bytes=len(answer.text.encode())))
    return found


def _delimiter(task: Any, *, chat: bool) -> str:
    """What stands between prompt and answer, by lm-eval's rule for multiple choice."""
    prefix = task.config.gen_prefix
    if chat and (not prefix or prefix[-1].isspace()):
        return ""
    return str(task.config.target_delimiter)
