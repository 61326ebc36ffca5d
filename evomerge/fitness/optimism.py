"""How much of the best search fitness is luck: the winner's curse, estimated from the scores at hand.

The best of many on some documents is the best partly by the luck of these documents; scoring it again on the same
ones does not take that away. So a tenth of the documents is put aside, again and again: how far the best on the
others falls on these is the luck in the choice (cross-validation; with nine tenths of the documents there is hardly
more of it than with all).

The candidates are taken as they are, although a search proposes the later ones by the scores of the earlier, so
this is a lower estimate. Only documents that the search never saw give the fitness itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.fitness.objectives import Objective, document_shares
from evomerge.fitness.samples import Samples

NUM_SPLITS = 1000

MAX_CANDIDATES = 100
"""So many are looked at, the best; the best on nine tenths of the documents is hardly ever another one."""


def optimism(samples: Sequence[Samples], objectives: Sequence[Objective], *, seed: int) -> float:
    """By how much the best of some candidates is expected to look better than it is; 0 at least.

    Args:
        samples: Their scores, all on the same documents.
        objectives: What the fitness is made of.
        seed: Seed of the splits.
    """
    shares = [document_shares(each, objectives) for each in samples]
    by_task = [np.array([each[task] for each in shares]) for task in shares[0]]
    by_task = [scores_CD for scores_CD in by_task if scores_CD.shape[1] > 1]
    generator = np.random.default_rng(seed)
    drops = []
    for _ in range(NUM_SPLITS if by_task else 0):
        chosen_C, other_C = np.zeros(len(samples)), np.zeros(len(samples))
        for scores_CD in by_task:
            order_D = generator.permutation(scores_CD.shape[1])
            aside = math.ceil(len(order_D) / 10)
            chosen_C += scores_CD[:, order_D[aside:]].mean(axis=1)
            other_C += scores_CD[:, order_D[:aside]].mean(axis=1)
        # Equals count alike: whichever came first would depend on their order, which may tell of all documents.
        best = chosen_C.max()
        drops.append(best - other_C[chosen_C >= best - 1e-12].mean())
    return max(0.0, float(np.mean(drops))) if drops else 0.0
