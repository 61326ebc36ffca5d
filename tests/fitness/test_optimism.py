"""The estimate of luck is what the best of many really loses on other documents."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.fitness.objectives import Objective
from evomerge.fitness.optimism import optimism
from evomerge.fitness.posterior import Array
from evomerge.fitness.samples import Samples
from evomerge.records import SampleScores
from tests.fitness.generations import answers

OBJECTIVES = (Objective(task="t", metric="acc", filter="none", weight=2, maximize=True),)


def as_samples(scores_CD: Array) -> list[Samples]:
    ids = tuple(range(scores_CD.shape[1]))
    return [{"t": SampleScores(doc_ids=ids, values={"acc,none": tuple(row.tolist())})} for row in scores_CD]


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_best_of_many_falls_by_about_as_much_on_other_documents(spread: float) -> None:
    rng = np.random.default_rng(1)
    expected, real = [], []
    for _ in range(25):
        scores_CD = answers(rng, 30, 2000, spread)
        searched_CD = scores_CD[:, :100]
        # Luck of the documents alone: how hard they are is the same for all candidates and no luck of one.
        best = int(searched_CD.mean(axis=1).argmax())
        real.append(searched_CD[best].mean() - searched_CD.mean() - scores_CD[best].mean() + scores_CD.mean())
        expected.append(optimism(as_samples(searched_CD), OBJECTIVES, seed=0))
    assert np.mean(real) > 0.02
    assert np.mean(expected) == pytest.approx(np.mean(real), rel=0.25)


def test_one_candidate_alone_had_no_luck() -> None:
    scores_CD = np.random.default_rng(2).random((1, 400))
    assert optimism(as_samples(scores_CD), OBJECTIVES, seed=0) == pytest.approx(0.0, abs=0.01)


def test_one_document_says_nothing() -> None:
    assert optimism(as_samples(np.ones((3, 1))), OBJECTIVES, seed=0) == 0.0


def test_the_order_of_the_candidates_says_nothing() -> None:
    """Equals on most documents are common; which of them is listed first must not matter."""
    scores_CD = answers(np.random.default_rng(3), 40, 60, 0.3).round()
    ranked_CD = scores_CD[np.argsort(-scores_CD.mean(axis=1), kind="stable")]
    found = [optimism(as_samples(each), OBJECTIVES, seed=0) for each in (scores_CD, ranked_CD)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    assert found[0] > 0.01
