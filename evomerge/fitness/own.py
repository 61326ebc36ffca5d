"""The user's own fitness: numbers per document from a function of theirs, or from a judge they ask.

Both are measures like any other, one number per document, so that races, constraints, tests and the holdout table
know nothing of where the numbers come from. `function.py` calls functions, `judge.py` asks judges; what gets the
model itself comes after everything that has the model speak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.fitness.objectives import Measure
from evomerge.fitness.user_code import UserCode, load_function
from evomerge.measure_settings import FunctionSettings, JudgeSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that answered some documents of a task, or is about to.

    Attributes:
        task: lm-eval's task.
        documents: The documents, ascending by their position in the task.
        texts: What the model said on each document, once or several times; empty for who reads no texts.
        model: The live model.
        tokenizer: Its tokenizer.
    """

    task: Any
    documents: Sequence[Mapping[str, Any]]
    texts: Sequence[Sequence[str]]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def said(self) -> list[tuple[Mapping[str, Any], str]]:
        """Every document with everything the model said on it."""
        return [
            (document, text)
            for document, texts in zip(self.documents, self.texts, strict=True)
            for text in texts
        ]

    def per_document(self, values: Sequence[float]) -> list[float]:
        """The mean over what was said on each document, of numbers in the order of `said`."""
        rest = iter(values)
        return [sum(next(rest) for _ in texts) / len(texts) for texts in self.texts]


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What a measure of the user's own gave.

    Attributes:
        values: A finite number per document.
        counts: Tallies for the audit.
    """

    values: Sequence[float]
    counts: Mapping[str, int] = field(default_factory=dict)


class OwnScorer(Protocol):
    """Gives a number per document."""

    reads_text: bool
    """Whether it needs what the model says."""

    def score(self, subject: Subject) -> Marks:
        """Score a model.

        Raises:
            FitnessError: There are no numbers to be had for this model.
            UnavailableError: Nothing can be scored at present.
        """
        ...


def reads_text(measure: Measure) -> bool:
    """Whether a measure of the user's own needs what the model says."""
    return not (isinstance(measure.own, FunctionSettings) and measure.own.given == "model")


def build_scorers(measures: Sequence[Measure], code: UserCode | None) -> dict[tuple[str, str], OwnScorer]:
    """Task as the objectives name it and metric -> who scores it.

    Args:
        measures: Those of the user's own; of several with one task and metric the first counts.
        code: The user's functions, or None where they may not run.

    Raises:
        FitnessError: A function cannot be loaded.
        ConfigurationError: The key of a judge is missing.
    """
    from evomerge.fitness.function import FunctionScorer
    from evomerge.fitness.judge import Judge, make_client

    found: dict[tuple[str, str], OwnScorer] = {}
    for measure in measures:
        key = measure.task, measure.metric
        if key in found:
            continue
        if isinstance(measure.own, JudgeSettings):
            found[key] = Judge(measure.own, make_client(measure.own), maximize=measure.maximize)
        elif measure.own is not None:
            assert code is not None, "code of the user's runs only with permission"
            found[key] = FunctionScorer(measure.own, load_function(measure.own.name, code), code.folder)
    return found
