"""Trials rank by constraints first, then fitness; the front is what no trial dominates."""

from __future__ import annotations

import itertools
import random
from typing import Any

from evomerge.fitness.objectives import Objective
from evomerge.fitness.ranking import merit, pareto_front, told
from evomerge.records import Status, Trial

OBJECTIVES = (
    Objective(task="a", metric="acc", filter="none", weight=1, maximize=True),
    Objective(task="b", metric="loss", filter="none", weight=1, maximize=False),
)


def trial(fitness: float | None, number: int = 0, **more: Any) -> Trial:
    status = Status.INVALID if fitness is None else Status.OK
    settings = {"candidate": "", "genome": (), "asked_after": 0, "status": status, **more}
    return Trial(number=number, fitness=fitness, **settings)


def test_who_holds_the_constraints_comes_first_then_who_violates_less_then_the_fitter() -> None:
    ranked = [
        trial(0.2),
        trial(-5.0),
        trial(0.4, violations={"x": 0.1}),
        trial(0.3, violations={"x": 0.1}),
        trial(0.9, violations={"x": 0.1, "y": 0.1}),
        trial(None, status=Status.PRUNED, screen=-0.5),
        trial(None, status=Status.PRUNED, screen=-0.75),
        trial(None),
    ]
    for seed in range(20):
        mixed = random.Random(seed).sample(ranked, len(ranked))
        values = told(mixed)
        by_trial = [values[mixed.index(each)] for each in ranked]
        assert by_trial[:2] == [0.2, -5.0]
        assert by_trial[-1] is None
        numbers = [value for value in by_trial if value is not None]
        assert all(first > second for first, second in itertools.pairwise(numbers))
    assert sorted(ranked[:5], key=merit, reverse=True) == ranked[:5]


def test_equals_are_told_the_same_and_a_failed_screening_nothing() -> None:
    values = told(
        [
            trial(0.5, violations={"x": 0.2}),
            trial(0.5, violations={"y": 0.1, "z": 0.1}),
            trial(None, status=Status.FAILED, screen=-0.5),
        ]
    )
    assert values[0] == values[1] is not None
    assert values[2] is None


def test_without_constraints_every_trial_is_told_its_fitness() -> None:
    trials = [trial(0.25), trial(None), trial(0.5, status=Status.PRUNED)]
    assert told(trials) == [0.25, None, 0.5]


def scored(number: int, acc: float, loss: float, **more: Any) -> Trial:
    metrics = {"a": {"acc,none": acc}, "b": {"loss,none": loss}}
    return trial((acc - loss) / 2, number, metrics=metrics, **more)


def test_the_front_is_that_of_comparing_every_pair() -> None:
    rng = random.Random(0)
    for _ in range(20):
        trials = [scored(number, rng.randrange(6) / 5, rng.randrange(6)) for number in range(40)]
        points = [(each.metrics["a"]["acc,none"], -each.metrics["b"]["loss,none"]) for each in trials]
        expected = {
            points.index(point)
            for point in points
            if not any(
                other != point and all(x >= y for x, y in zip(other, point, strict=True)) for other in points
            )
        }
        found = pareto_front(trials, OBJECTIVES)
        assert {each.number for each in found} == expected
        assert [each.fitness for each in found] == sorted((each.fitness for each in found), reverse=True)


def test_on_the_front_is_only_what_was_scored_in_full_and_holds_the_constraints() -> None:
    trials = [
        scored(0, 0.9, 0.0, status=Status.PRUNED),
        scored(1, 0.9, 0.0, violations={"x": 0.1}),
        trial(None, 2),
        scored(3, 0.5, 1.0),
        scored(4, 0.5, 1.0),
        scored(5, 0.4, 0.5),
    ]
    assert [each.number for each in pareto_front(trials, OBJECTIVES)] == [5, 3]
    assert [each.number for each in pareto_front(trials, OBJECTIVES[:1])] == [3]
    assert pareto_front(trials[:3], OBJECTIVES) == []
