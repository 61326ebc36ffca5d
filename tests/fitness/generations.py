"""Made-up generations of candidates."""

from __future__ import annotations

import numpy as np

from evomerge.fitness.posterior import Array


def answers(rng: np.random.Generator, num: int, documents: int, spread: float) -> Array:
    """Right and wrong answers of candidates of different ability on documents of different difficulty.

    Args:
        rng: Source of the draws.
        num: Number of candidates.
        documents: Number of documents.
        spread: Standard deviation of the abilities, in logits.
    """
    ability_C, difficulty_D = rng.normal(0.0, spread, num), rng.normal(0.0, 1.5, documents)
    chance_CD = 1 / (1 + np.exp(difficulty_D[None, :] - ability_C[:, None]))
    scores_CD = (rng.random((num, documents)) < chance_CD).astype(float)
    # A tiny amount breaks ties, as ranks need one order.
    scores_CD[:, 0] += rng.random(num) * 1e-6
    return scores_CD
