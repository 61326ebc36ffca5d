"""Races lose no more of the best than they state, and spend what they may lose where stops are surest."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.fitness.posterior import Seen, draw_means
from evomerge.fitness.racing import Budget, Reached, Standing, standings
from tests.fitness.generations import answers


def standing(among_best: float, best: float = 0.0) -> Standing:
    return Standing(among_best=among_best, best=best)


@pytest.mark.parametrize("spread", [0.2, 0.6])
def test_the_share_of_the_best_that_goes_out_is_below_the_error_rate(spread: float) -> None:
    """Whole races of candidates that lie close together and of such that do not, at two error rates."""
    rng = np.random.default_rng(7)
    ends = (10, 15, 20, 30, 40, 50, 60, 80)
    for error_rate in (0.15, 0.3):
        lost, first_lost, used = [], [], []
        for _ in range(60):
            scores_CD = answers(rng, 10, 100, spread)
            ranked = np.argsort(-scores_CD.mean(axis=1), kind="stable").tolist()
            budget, racing, settled = Budget(error_rate, 5, len(ends)), list(range(10)), 0
            used.append(10 * ends[0])
            for first, end in zip(ends, (*ends[1:], 100), strict=True):
                seen = Seen(scores_MCD=scores_CD[None, racing, :first], total=100)
                drawn_SC = draw_means(seen, np.random.default_rng(first))[:, 0]
                reached = Reached(fitness_SC=drawn_SC, violated_SC=np.zeros_like(drawn_SC))
                stops = budget.stops(standings(reached, max(1, 5 - settled)))
                lost += [racing[place] in ranked[:5] for place, stop in stops.items() if stop.out]
                first_lost += [racing[place] == ranked[0] for place in stops]
                settled += sum(not stop.out for stop in stops.values())
                racing = [runner for place, runner in enumerate(racing) if place not in stops]
                used[-1] += len(racing) * (end - first)
                if len(racing) < 2:
                    break
        assert 0.3 * error_rate < sum(lost) / (60 * 5) < error_rate
        assert sum(first_lost) / 60 < error_rate
        assert np.mean(used) < 800


def test_the_surest_stops_come_first_until_the_look_has_spent_its_part() -> None:
    found = [standing(each) for each in (0.02, 0.3, 0.9, 0.6, 0.03, 0.99)]
    stops = Budget(0.1, 3, 1).stops([*found, standing(1.0, best=1.0)])
    # Going out may cost 0.3 in all, and so may being settled.
    assert {place: stop.out for place, stop in stops.items()} == {0: True, 4: True, 2: False, 5: False}
    stops = Budget(0.1, 3, 6).stops([*found, standing(1.0, best=1.0)])
    assert sorted(stops) == [0, 4, 5]


def test_what_one_look_does_not_spend_the_next_one_may() -> None:
    budget = Budget(0.2, 1, 2)
    found = [standing(0.15), standing(0.2), standing(1.0, best=1.0)]
    assert budget.stops(found) == {}
    assert sorted(budget.stops(found)) == [0]


def test_one_that_may_become_the_best_of_the_run_goes_on() -> None:
    budget = Budget(0.2, 5, 1)
    stops = budget.stops([standing(1.0, best=0.3), standing(1.0, best=0.5), standing(1.0, best=0.15)])
    assert sorted(stops) == [2]


def test_the_most_promising_one_goes_on_even_when_nothing_can_be_won() -> None:
    assert sorted(Budget(0.2, 2, 1).stops([standing(1.0), standing(1.0), standing(0.0)])) == [1, 2]


def test_constraints_come_before_fitness() -> None:
    fitness_SC = np.tile([0.9, 0.5, 0.7], (100, 1))
    violated_SC = np.tile([0.2, 0.0, 0.1], (100, 1))
    reached = Reached(fitness_SC=fitness_SC, violated_SC=violated_SC)
    assert [each.among_best for each in standings(reached, 2)] == [0, 1, 1]
    assert [each.best for each in standings(reached, 2)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("incumbent", "chance"), [((0.0, 0.65), 0.25), ((0.0, 0.4), 1.0), ((-0.1, 0.99), 1.0), ((0.0, 0.7), 0.0)]
)
def test_the_best_of_the_run_is_better_than_the_best_so_far(
    incumbent: tuple[float, float], chance: float
) -> None:
    fitness_SC = np.tile([[0.5, 0.1]] * 3 + [[0.7, 0.1]], (25, 1))
    reached = Reached(fitness_SC=fitness_SC, violated_SC=np.zeros_like(fitness_SC))
    assert [each.best for each in standings(reached, 1, incumbent)] == [chance, 0]
