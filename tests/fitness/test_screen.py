"""A screening looks at the objectives' documents by likelihood and lets the better share pass."""

from __future__ import annotations

import pytest

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Objective
from evomerge.fitness.screen import passing, screening_documents, screening_score

OBJECTIVES = [
    Objective(task="a", metric="acc", filter="none", weight=3, maximize=True),
    Objective(task="b", metric="loss", filter="none", weight=1, maximize=False),
]


def test_only_the_objectives_tasks_are_screened_and_only_by_likelihood() -> None:
    documents = [DocumentSet(task=task, doc_ids=(0, 2), name=task) for task in "abc"]
    found = screening_documents(documents, OBJECTIVES)
    assert [(each.name, each.doc_ids, each.metrics) for each in found] == [
        (task, (0, 2), (("likelihood", "evomerge"),)) for task in "ab"
    ]


def test_the_score_is_the_mean_likelihood_by_weight_whatever_the_direction() -> None:
    metrics = {"a": {"likelihood,evomerge": -0.5}, "b": {"likelihood,evomerge": -1.5}}
    assert screening_score(metrics, OBJECTIVES) == (3 * -0.5 + -1.5) / 4


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.5, [4, 7, 9]), (0.6, [4, 7, 9]), (0.7, [4, 5, 7, 9]), (0.01, [7])]
)
def test_the_best_share_passes_rounded_up_the_earlier_of_equals(keep: float, expected: list[int]) -> None:
    scores = {4: -0.5, 5: -0.8, 6: -0.9, 7: -0.1, 9: -0.3}
    assert passing(scores, keep) == expected


def test_shares_that_floats_cannot_hold_are_not_rounded_up_twice() -> None:
    scores = dict.fromkeys(range(10), 0.0)
    assert passing(scores, 0.7) == list(range(7))
    assert passing(scores, 0.1) == [0]
