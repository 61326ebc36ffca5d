"""How the trials of a search rank.

With constraints, by the rules of Deb, "An efficient constraint handling method for genetic algorithms", 2000,
https://doi.org/10.1016/S0045-7825(99)00389-8: who holds all of them comes before who does not; of two who do, the
fitter one; of two who do not, the one that violates them less in sum. A violation that two share leaves the
fitness to decide. Behind them come those that went out of a race, by the block they reached, and last those that a
screening left out, by what they reached in it.

With several objectives the weighted mean guides the search, and `pareto_front` shows what else there is: the
trials of which no other is as good in every objective and better in one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.fitness.objectives import Objective
from evomerge.records import Status, Trial

SCREENED, OUT, VIOLATING = 0.0, 1.0, 2.0
"""What ranks behind the trials that hold all constraints, from last to first."""


def merit(trial: Trial) -> tuple[float, float]:
    """What scored trials compare by, the larger the better."""
    assert trial.fitness is not None, f"trial {trial.number} was not scored"
    return -math.fsum(trial.violations.values()), trial.fitness


def told(trials: Sequence[Trial]) -> list[float | None]:
    """What a searcher is told of every trial of a generation, so that it ranks them as they rank here.

    Trials that hold all constraints keep their fitness, or go right below the worst of these if they went out of a
    race and are estimated above it; the others go right below. None stays None.
    """
    values: list[float | None] = [None] * len(trials)
    behind: dict[tuple[float, ...], list[int]] = {}
    for place, trial in enumerate(trials):
        if trial.fitness is not None and trial.out_after:
            behind.setdefault((OUT, trial.out_after, *merit(trial)), []).append(place)
        elif trial.fitness is not None and not trial.violations:
            values[place] = trial.fitness
        elif trial.fitness is not None:
            behind.setdefault((VIOLATING, *merit(trial)), []).append(place)
        elif trial.screen is not None and trial.status is Status.PRUNED:
            behind.setdefault((SCREENED, trial.screen), []).append(place)
    bound = min((value for value in values if value is not None), default=0.0)
    for key in sorted(behind, reverse=True):
        bound = math.nextafter(bound, -math.inf)
        if key[0] == OUT and not key[2]:
            bound = min(bound, key[3])
        for place in behind[key]:
            values[place] = bound
    return values


def pareto_front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The trials, scored on all documents and holding all constraints, that no other one dominates.

    Of trials that are equal in every objective the first counts. The order is by falling fitness, then number.
    """
    scored = [
        trial
        for trial in sorted(trials, key=lambda trial: trial.number)
        if trial.status is Status.OK and trial.fitness is not None and not trial.violations
    ]
    if not scored:
        return []
    signs = np.array([1.0 if item.maximize else -1.0 for item in objectives])
    values = signs * np.array([[item.of(trial.metrics) for item in objectives] for trial in scored])
    front: list[int] = []
    # Whoever dominates another has the larger sum, or the same by rounding and larger first values.
    for place in np.lexsort((*-values.T[::-1], -values.sum(axis=1))):
        others = values[front]
        if not (others >= values[place]).all(axis=1).any():
            front.append(int(place))
    return sorted(
        (scored[place] for place in front), key=lambda trial: (-(trial.fitness or 0.0), trial.number)
    )
