"""The seam between a live model and whatever scores it.

An evaluator holds documents and knows how to score the model it was bound to; it knows nothing of merging.
`harness.py` is the real one, `fake.py` the one for tests and dry runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from evomerge.records import Metrics, SampleScores


class NonFiniteLogitsError(Exception):
    """The model's logits hold NaN or infinity, so that no score of it means anything."""


class UnavailableError(Exception):
    """What scores models cannot be reached, so that nothing is known of any model; the run has to stop."""


@dataclass(frozen=True, kw_only=True)
class DocumentSet:
    """Some documents of one task.

    Attributes:
        task: The lm-eval task they belong to.
        doc_ids: Their positions in the task's evaluation set, ascending.
        name: The task as the objectives name it; differs from `task` for a holdout task.
        complete: Whether they are all documents of the task.
        metrics: The (metric, filter) pairs wanted; None for those of the experiment.
        exact: Whether they are scored by the very batches of the stock command, as announced numbers are, or in the
            fastest way, whose rounding differs. Scores that are compared are made the same way.
    """

    task: str
    doc_ids: tuple[int, ...]
    name: str
    complete: bool = False
    metrics: tuple[tuple[str, str], ...] | None = None
    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What scoring a model gave.

    Attributes:
        metrics: Task as the objectives name it -> metric -> aggregated value.
        samples: Task as the objectives name it -> per-document scores.
        forward_seconds: Time spent inside the model's forward passes.
        counts: Tallies for the audit: `generations`, `truncated` ones that hit the token limit, the
            `output_tokens` of all, what `fitness.tallies` counts, and of judges the `judged` generations and
            the `unreadable` replies.
    """

    metrics: Metrics
    samples: Mapping[str, SampleScores]
    forward_seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)


class Evaluator(Protocol):
    """Scores the model it is bound to."""

    def evaluate(self, documents: Sequence[DocumentSet]) -> Scores:
        """Score the model's present weights on the documents, one task at a time.

        Raises:
            NonFiniteLogitsError: The model's logits are not finite.
            FitnessError: A function or judge of the user's has no score for the model.
            UnavailableError: Nothing can be scored at present.
        """
        ...
