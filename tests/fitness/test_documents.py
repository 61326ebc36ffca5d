"""The split of documents is deterministic, disjoint, and that of earlier versions."""

from __future__ import annotations

import json

import pytest

from evomerge.fitness.documents import split_documents


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("holdout", [0.0, 0.3, 0.99])
def test_a_split_is_complete_disjoint_and_always_the_same(count: int, holdout: float) -> None:
    searched, held_out = split_documents("gen", count, holdout=holdout, limit=None)
    assert sorted(searched + held_out) == list(range(count))
    assert list(searched) == sorted(searched)
    assert list(held_out) == sorted(held_out)
    assert searched
    assert bool(held_out) == (holdout > 0 and count > 1)
    assert (searched, held_out) == split_documents("gen", count, holdout=holdout, limit=None)


def test_a_limit_thins_the_search_set_only_and_differs_between_tasks() -> None:
    searched, held_out = split_documents("gen", 100, holdout=0.3, limit=None)
    fewer, same = split_documents("gen", 100, holdout=0.3, limit=10)
    assert len(held_out) == 30
    assert same == held_out
    assert len(fewer) == 10
    assert set(fewer) < set(searched)
    assert fewer != tuple(range(10))
    assert split_documents("choose", 100, holdout=0.3, limit=None)[1] != held_out


def test_the_split_is_the_one_of_earlier_versions() -> None:
    """A resumed run of another version must not open its holdout."""
    assert json.dumps(split_documents("gen", 10, holdout=0.3, limit=4)) == "[[0, 1, 3, 5], [2, 4, 7]]"
