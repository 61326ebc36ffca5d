"""Draws of what candidates reach on all documents are as wide as what happens, from few documents on."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.fitness.posterior import NUM_DRAWS, Array, Reference, Seen, draw_means
from tests.fitness.generations import answers


def draws(scores_CD: Array, count: int) -> Array:
    seen = Seen(scores_MCD=scores_CD[None, :, :count], total=scores_CD.shape[1])
    return draw_means(seen, np.random.default_rng(0))[:, 0]


def chances(scores_CD: Array, count: int, wanted: int) -> Array:
    """Chance of every candidate to be among the best."""
    order_SC = np.argsort(-draws(scores_CD, count), axis=1)
    return np.bincount(order_SC[:, :wanted].ravel(), minlength=len(scores_CD)) / NUM_DRAWS


@pytest.mark.parametrize(("count", "spread"), [(12, 0.6), (24, 0.6), (60, 0.6), (24, 0.2), (60, 0.2)])
def test_stated_chances_come_true(count: int, spread: float) -> None:
    rng = np.random.default_rng(count)
    stated, true = [], []
    for _ in range(300):
        scores_CD = answers(rng, 10, 120, spread)
        order = np.argsort(-scores_CD.mean(axis=1))
        stated += chances(scores_CD, count, 5).tolist()
        true += [index in order[:5] for index in range(10)]
    stated_array, true_array = np.array(stated), np.array(true)
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.7), (0.7, 0.9), (0.9, 1.01)):
        inside = (stated_array >= low) & (stated_array < high)
        assert inside.sum() > 20
        error = 3 * np.sqrt(0.25 / inside.sum())
        assert true_array[inside].mean() == pytest.approx(stated_array[inside].mean(), abs=max(0.07, error))


def test_certainty_comes_with_the_last_document() -> None:
    scores_CD = np.random.default_rng(0).random((6, 40))
    assert draws(scores_CD, 40) == pytest.approx(np.tile(scores_CD.mean(axis=1), (NUM_DRAWS, 1)))


def test_a_few_documents_that_agree_are_no_certainty() -> None:
    scores_CD = np.zeros((2, 100))
    scores_CD[0, :3] = 1.0
    better, worse = chances(scores_CD, 3, 1)
    assert 0.7 < better < 0.99
    assert worse == pytest.approx(1 - better)


def test_candidates_that_are_alike_share_the_chance() -> None:
    scores_CD = np.tile(np.random.default_rng(1).random(50), (4, 1))
    assert chances(scores_CD, 25, 2) == pytest.approx(np.full(4, 0.5), abs=0.05)


def test_a_reference_says_how_hard_the_documents_left_are() -> None:
    """The first documents are easy; who knows that from another model does not expect the others to be."""
    rng = np.random.default_rng(2)
    level_D = np.linspace(1.0, 0.0, 100)
    scores_MCD = (level_D + rng.normal(0.0, 0.05, (3, 100)))[None]
    known_D = level_D + rng.normal(0.0, 0.05, 100)
    reference = Reference(scores_MD=known_D[None, :20], means_M=np.array([known_D.mean()]))
    alone, compared = (
        draw_means(Seen(scores_MCD=scores_MCD[:, :, :20], total=100, reference=each), rng)[:, 0]
        for each in (None, reference)
    )
    assert np.all(np.abs(alone.mean(axis=0) - 0.9) < 0.05)
    assert compared.mean(axis=0) == pytest.approx(scores_MCD[0].mean(axis=1), abs=0.03)
    assert np.all(compared.std(axis=0) < 0.03)


def test_measures_of_a_task_are_drawn_together() -> None:
    rng = np.random.default_rng(3)
    first_CD = rng.random((5, 80))
    scores_MCD = np.stack([first_CD, -100 * first_CD + rng.normal(0.0, 1.0, (5, 80))])
    drawn_SMC = draw_means(Seen(scores_MCD=scores_MCD[:, :, :40], total=80), rng)
    assert drawn_SMC.shape == (NUM_DRAWS, 2, 5)
    for candidate in range(5):
        assert np.corrcoef(drawn_SMC[:, 0, candidate], drawn_SMC[:, 1, candidate])[0, 1] < -0.8
    # Chances do not depend on the units of another measure.
    alone_SC = draw_means(Seen(scores_MCD=scores_MCD[:1, :, :40], total=80), rng)[:, 0]
    assert drawn_SMC[:, 0].mean(axis=0) == pytest.approx(alone_SC.mean(axis=0), abs=0.01)
    assert drawn_SMC[:, 0].std(axis=0) == pytest.approx(alone_SC.std(axis=0), rel=0.15)
