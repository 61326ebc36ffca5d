"""The fake scores smoothly, deterministically, and notices weights that are not finite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from evomerge.fitness.base import DocumentSet, Evaluator, NonFiniteLogitsError
from evomerge.fitness.fake import FakeEvaluator

DOCUMENTS = (DocumentSet(task="gen", doc_ids=(0, 3, 4), name="gen"),)
METRICS = {"gen": (("exact_match", "none"),)}


def test_scores_follow_the_weights(models: dict[str, Any]) -> None:
    live = copy.deepcopy(models["A"])
    fake: Evaluator = FakeEvaluator(live, METRICS)
    first = fake.evaluate(DOCUMENTS)
    (column,) = first.samples["gen"].values.values()
    assert first.samples["gen"].doc_ids == (0, 3, 4)
    assert len(set(column)) == 3
    assert all(0 < value < 1 for value in column)
    assert first.metrics == {"gen": {"exact_match,none": pytest.approx(sum(column) / 3)}}
    assert fake.evaluate(DOCUMENTS) == first

    moves = []
    for share in (1e-3, 1.0):
        with torch.no_grad():
            for mine, a, b in zip(
                live.parameters(), models["A"].parameters(), models["B"].parameters(), strict=True
            ):
                mine.copy_(torch.lerp(a, b, share))
        (moved,) = fake.evaluate(DOCUMENTS).samples["gen"].values.values()
        moves.append(max(abs(x - y) for x, y in zip(moved, column, strict=True)))
    assert 0 < moves[0] < 0.01 * moves[1] < 0.01


def test_weights_that_are_not_finite_have_no_score(models: dict[str, Any]) -> None:
    live = copy.deepcopy(models["A"])
    with torch.no_grad():
        live.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        FakeEvaluator(live, METRICS).evaluate(DOCUMENTS)
