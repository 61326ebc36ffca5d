"""The winner of a run is the trial that won, not another of the same candidate."""

from __future__ import annotations

from typing import Any

from evomerge.records import Final, Status, Trial
from evomerge.stages import WINNER, named_winner

NAMED = Final(name=WINNER, stage="confirm", candidate="same", recipe=None, status=Status.OK)


def trial(number: int, status: Status, fitness: float | None, **more: Any) -> Trial:
    return Trial(
        number=number, candidate="same", genome=(), asked_after=0, status=status, fitness=fitness, **more
    )


LEFT_OUT = trial(0, Status.PRUNED, None, screen=-1.0)
WENT_OUT = trial(1, Status.PRUNED, 0.9, out_after=1)
GAVE_UP = trial(2, Status.FAILED, None)
SETTLED = trial(3, Status.PRUNED, 0.6)
SCORED = trial(4, Status.OK, 0.7)


def test_the_named_winner_is_the_trial_that_was_scored_on_all_documents() -> None:
    assert named_winner([LEFT_OUT, WENT_OUT, GAVE_UP, SETTLED, SCORED], [NAMED]) is SCORED


def test_one_that_a_race_settled_may_be_named() -> None:
    assert named_winner([LEFT_OUT, WENT_OUT, GAVE_UP, SETTLED], [NAMED]) is SETTLED


def test_until_one_is_named_it_is_the_best() -> None:
    assert named_winner([SETTLED, SCORED], []) is SCORED
