"""The chances by which a race decides are right, also where documents are few or candidates alike."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.fitness.racing import Seen, standings


def seen(scores: np.ndarray, count: int) -> list[Seen]:
    return [Seen(scores_CD=scores[:, :count], total=scores.shape[1])]


def population(rng: np.random.Generator, num: int, documents: int) -> np.ndarray:
    """Right and wrong answers of candidates of different ability on documents of different difficulty."""
    ability, difficulty = rng.normal(0.0, 0.6, num), rng.normal(0.0, 1.5, documents)
    chance = 1 / (1 + np.exp(difficulty[None, :] - ability[:, None]))
    return (rng.random((num, documents)) < chance).astype(float)


@pytest.mark.parametrize("count", [12, 24, 60])
def test_stated_chances_come_true(count: int) -> None:
    rng = np.random.default_rng(count)
    stated, true = [], []
    for _ in range(300):
        scores = population(rng, 10, 120)
        # A tiny amount breaks ties, as ranks need one order.
        scores[:, 0] += rng.random(10) * 1e-6
        order = np.argsort(-scores.mean(axis=1))
        for index, standing in enumerate(standings(seen(scores, count), 5, seed=0)):
            stated.append(standing.among_best)
            true.append(index in order[:5])
    stated_array, true_array = np.array(stated), np.array(true)
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.7), (0.7, 0.9), (0.9, 1.01)):
        inside = (stated_array >= low) & (stated_array < high)
        assert inside.sum() > 50
        assert true_array[inside].mean() == pytest.approx(stated_array[inside].mean(), abs=0.07)


def test_certainty_comes_with_the_last_document() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((6, 40))
    order = np.argsort(-scores.mean(axis=1))
    found = standings(seen(scores, 40), 3, seed=0)
    assert [found[index].among_best for index in order] == [1, 1, 1, 0, 0, 0]
    assert [found[index].best for index in order] == [1, 0, 0, 0, 0, 0]
    assert found[0].mean == pytest.approx(scores[0].mean())


def test_a_few_documents_that_agree_are_no_certainty() -> None:
    scores = np.zeros((2, 100))
    scores[0, :3] = 1.0
    better, worse = standings(seen(scores, 3), 1, seed=0)
    assert 0.7 < better.among_best < 0.99
    assert worse.among_best == pytest.approx(1 - better.among_best)


def test_candidates_that_are_alike_share_the_chance() -> None:
    scores = np.tile(np.random.default_rng(1).random(50), (4, 1))
    for standing in standings(seen(scores, 25), 2, seed=0):
        assert standing.among_best == pytest.approx(0.5, abs=0.05)


def test_tasks_add_up() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.random((3, 30)), rng.random((3, 50)) * 5
    tasks = [Seen(scores_CD=one, total=30), Seen(scores_CD=two, total=50)]
    for index, standing in enumerate(standings(tasks, 1, seed=0)):
        assert standing.mean == pytest.approx(one[index].mean() + two[index].mean())
