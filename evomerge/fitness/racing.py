"""Racing: which candidates of a generation need no more documents.

Candidates are scored in blocks of documents, all on the same ones. After a block follows from joint draws of what
each would reach on all documents (`fitness.posterior`) how likely it is among the best `wanted` of its generation,
which is what an evolution strategy selects by, and how likely it becomes the best of the run, which is what the
run is after. Then

- a candidate that is unlikely among the best goes *out*, at the price of that chance;
- a candidate that is likely among the best, and not the best of the run, is *settled*, at the price of the chance
  that it is not among them: where exactly it ranks among the chosen matters little.

Where the Pareto front of several objectives is wanted too, a candidate that is likely on it goes on.

The chance of a candidate when it stops is what its stop costs on average, whenever that happens. So the sum of
these chances is the expected number of the truly best that a race loses, over all its looks; `Budget` keeps it
within `error_rate` of them. It is spent evenly over the looks, the surest stops first, because the first looks
would spend it on guesses otherwise.

The idea of racing is from Maron and Moore, "Hoeffding Races: Accelerating Model Selection Search for Classification
and Function Approximation", 1993; the use of it within evolution strategies from Heidrich-Meisner and Igel,
"Hoeffding and Bernstein Races for Selecting Policies in Evolutionary Direct Policy Search", 2009,
https://doi.org/10.1145/1553374.1553426. Their bounds hold for any distribution, but are so wide that they stop
hardly any candidate before a few hundred documents. Spending an error over looks follows Lan and DeMets, "Discrete
Sequential Boundaries for Clinical Trials", 1983, https://doi.org/10.1093/biomet/70.3.659.

Legend: S draws, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.posterior import Array

Merit = tuple[float, float]
"""What models compare by, the larger the better; `fitness.ranking.merit`."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Draws of what candidates reach on all documents.

    Attributes:
        fitness_SC: Their fitness.
        violated_SC: Sum of their relative violations of constraints.
        values_OSC: What they are worth in each objective, the larger the better; none if nobody asks for the front.
    """

    fitness_SC: Array
    violated_SC: Array
    values_OSC: Sequence[Array] = ()


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a candidate stands after a block.

    Attributes:
        among_best: Chance to be among the best `wanted`.
        best: Chance to be the best of all and better than the best of the run so far.
        front: Chance that nothing is as good in every objective; 0 if nobody asks for the front.
    """

    among_best: float
    best: float
    front: float = 0.0


def standings(
    reached: Reached, wanted: int, incumbent: Merit | None = None, front: Sequence[Sequence[float]] = ()
) -> list[Standing]:
    """How every candidate that is still racing stands.

    Args:
        reached: Draws of what they reach.
        wanted: How many of them will be chosen.
        incumbent: What the best of the run so far reaches.
        front: What the models on the front so far are worth in each objective.
    """
    num_draws, num = reached.fitness_SC.shape
    order_SC = np.lexsort((-reached.fitness_SC, reached.violated_SC), axis=-1)
    chosen_C = np.bincount(order_SC[:, :wanted].ravel(), minlength=num) / num_draws
    first_S = order_SC[:, 0]
    is_new_S = np.ones(num_draws, dtype=bool)
    if incumbent is not None:
        draws_S = np.arange(num_draws)
        merit_S = -reached.violated_SC[draws_S, first_S]
        is_fitter_S = reached.fitness_SC[draws_S, first_S] > incumbent[1]
        is_new_S = (merit_S > incumbent[0]) | ((merit_S == incumbent[0]) & is_fitter_S)
    best_C = np.bincount(first_S[is_new_S], minlength=num) / num_draws
    front_C = _on_front(reached, front)
    return [
        Standing(among_best=float(chosen), best=float(best), front=float(on_front))
        for chosen, best, on_front in zip(chosen_C, best_C, front_C, strict=True)
    ]


def _on_front(reached: Reached, front: Sequence[Sequence[float]]) -> Array:
    """Chance of every candidate to be on the front: it holds the constraints, and nothing is as good everywhere."""
    num = reached.fitness_SC.shape[1]
    if not reached.values_OSC:
        return np.zeros(num)
    is_on_SC = reached.violated_SC == 0
    for known in front:
        is_on_SC &= ~_as_good(known, reached.values_OSC)
    for other in range(num):
        is_worse_SC = _as_good(
            [values_SC[:, other, None] for values_SC in reached.values_OSC], reached.values_OSC
        )
        is_worse_SC[:, other] = False
        is_on_SC &= ~(is_worse_SC & (reached.violated_SC[:, other, None] == 0))
    chance_C: Array = is_on_SC.mean(axis=0)
    return chance_C


def _as_good(one: Sequence[float] | Sequence[Array], others_OSC: Sequence[Array]) -> NDArray[np.bool_]:
    """Where one model is as good as others in every objective."""
    found_SC = np.ones(others_OSC[0].shape, dtype=np.bool_)
    for value, values_SC in zip(one, others_OSC, strict=True):
        found_SC &= np.asarray(value) >= values_SC
    return found_SC


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a candidate stops.

    Attributes:
        out: Whether it is too unlikely among the best; else it is settled.
        standing: How it stood.
    """

    out: bool
    standing: Standing


class Budget:
    """What a race may lose, and what its stops have cost so far.

    Four things are counted apart, each with `error_rate` of what there is: the best `wanted` that go out, the
    places among them that settled candidates take wrongly, the best of the run, of which a generation has at
    most one, and those of the front, as many as are expected.

    Args:
        error_rate: Largest expected share of them that is lost.
        wanted: How many candidates will be chosen.
        looks: How often `stops` will be asked.
    """

    def __init__(self, error_rate: float, wanted: int, looks: int) -> None:
        self._error_rate = error_rate
        self._wanted = wanted
        self._looks = looks
        self._look = 0
        self._spent = {True: 0.0, False: 0.0}
        self._spent_best = 0.0
        self._spent_front = 0.0

    def stops(self, standings: Sequence[Standing]) -> dict[int, Stop]:
        """Who stops at this look; the most promising candidate never does.

        Args:
            standings: How the candidates stand that are still racing.

        Returns:
            Place among them -> why it stops.
        """
        self._look += 1
        allowed = self._error_rate * self._look / self._looks
        places = range(len(standings))
        favourite = max(places, key=lambda at: (standings[at].best, standings[at].among_best, -at))
        on_front = self._spent_front + sum(standing.front for standing in standings)
        found: dict[int, Stop] = {}
        for place in sorted(places, key=lambda at: (_price(standings[at]), at)):
            standing = standings[place]
            out, price = standing.among_best < 0.5, _price(standing)
            fits = (
                self._spent[out] + price <= allowed * self._wanted
                and self._spent_best + standing.best <= allowed
                and self._spent_front + standing.front <= allowed * on_front
            )
            if place != favourite and fits:
                self._spent[out] += price
                self._spent_best += standing.best
                self._spent_front += standing.front
                found[place] = Stop(out=out, standing=standing)
        return found


def _price(standing: Standing) -> float:
    """The chance that a stop is wrong, going out or being settled, whichever is surer."""
    return min(standing.among_best, 1 - standing.among_best)
