"""What candidates would reach on all documents, given their scores on some: joint draws.

The documents that are left are a sample of the same kind as those seen. Candidates are scored on the same
documents and fail on the same ones, and so do the measures of a task; all these covariances are kept. A model
whose scores are known on all documents serves as a reference: candidates are predicted by how they differ from
it, which says far better than their own scores how hard the documents left are.

Candidates differ less than their means on few documents do: the means shrink towards that of all candidates
(empirical Bayes, as in Efron and Morris, "Data Analysis Using Stein's Estimator and its Generalizations", 1975,
https://doi.org/10.1080/01621459.1975.10479864).

Legend: M measures of a task, C candidates, D documents scored so far, S draws, R = M C rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 4000
"""Draws from which chances are counted; a chance of 0.1 is then known within 0.01."""

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model that was scored on all documents of a task.

    Attributes:
        scores_MD: Its scores on the documents that the candidates were scored on.
        means_M: Its means over all documents.
    """

    scores_MD: Array
    means_M: Array


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of the candidates on one task.

    Attributes:
        scores_MCD: Their scores.
        total: Number of documents of the task in all.
        reference: A model to compare them with, if there is one.
    """

    scores_MCD: Array
    total: int
    reference: Reference | None = None


def draw_means(seen: Seen, generator: np.random.Generator) -> Array:
    """Draw what the candidates' means over all documents may come out as.

    Args:
        seen: What is known.
        generator: Source of the draws.

    Returns:
        Draws of shape S x M x C.
    """
    shape_MCD, reference = seen.scores_MCD.shape, seen.reference
    offset_M = np.zeros(shape_MCD[0]) if reference is None else reference.means_M
    mean_R, covariance_RR = _posterior(seen)
    # The root by eigenvalues also serves covariances that are not definite: candidates that are alike.
    values, vectors = np.linalg.eigh(covariance_RR)
    root_RR = vectors * np.sqrt(np.clip(values, 0.0, None))
    # The covariance is itself estimated, from as many documents; hence Student's t instead of the normal.
    tails_S = np.sqrt(shape_MCD[2] / generator.chisquare(shape_MCD[2], NUM_DRAWS))
    drawn_SR = mean_R + (generator.standard_normal((NUM_DRAWS, len(mean_R))) @ root_RR.T) * tails_S[:, None]
    drawn_SMC: Array = drawn_SR.reshape(NUM_DRAWS, *shape_MCD[:2]) + offset_M[:, None]
    return drawn_SMC


def _posterior(seen: Seen) -> tuple[Array, Array]:
    """Mean and covariance of the means over all documents, less the reference's."""
    num_M, num_C, count = seen.scores_MCD.shape
    scores_MCD = seen.scores_MCD
    if seen.reference is not None:
        scores_MCD = scores_MCD - seen.reference.scores_MD[:, None, :]
    scores_RD = scores_MCD.reshape(num_M * num_C, count)
    mean_R = scores_RD.mean(axis=1)
    rest = seen.total - count
    if not rest:
        return mean_R, np.zeros((len(mean_R), len(mean_R)))
    spread_M = np.ptp(seen.scores_MCD, axis=(1, 2))
    spread_M[spread_M == 0] = 1.0
    centred_RD = scores_RD - mean_R[:, None]
    within_RR = _within(centred_RD @ centred_RD.T, count, spread_M)
    noise_RR = within_RR / count
    common_R, prior_RR = _prior(mean_R, noise_RR, spread_M, count / seen.total)
    gain_RR = np.linalg.solve(prior_RR + noise_RR, prior_RR).T
    ability_R = common_R + gain_RR @ (mean_R - common_R)
    ability_RR = prior_RR - gain_RR @ prior_RR
    share = rest / seen.total
    return (1 - share) * mean_R + share * ability_R, share**2 * (ability_RR + within_RR / rest)


def _within(products_RR: Array, count: int, spread_M: Array) -> Array:
    """Covariance of scores over documents, estimated from the sums of their products.

    Few documents say little of each covariance, but much of what they are on average. So it counts like as many
    more documents as there are candidates that any two candidates are alike in it, which is what is known of them
    beforehand; and like one more that they differ by chance as much as scores do, because a few documents that
    agree by luck must not pass for certainty.
    """
    num_M = len(spread_M)
    num_C = len(products_RR) // num_M
    blocks_MCMC = products_RR.reshape(num_M, num_C, num_M, num_C)
    own_MM = np.einsum("icjc->ij", blocks_MCMC) / num_C
    other_MM = (blocks_MCMC.sum(axis=(1, 3)) - num_C * own_MM) / max(1, num_C * (num_C - 1))
    alike_RR = np.kron(other_MM, np.ones((num_C, num_C))) + np.kron(own_MM - other_MM, np.eye(num_C))
    chance_RR = np.diag(np.repeat(spread_M**2 / 2, num_C))
    return (products_RR + alike_RR * (num_C / count) + chance_RR) / (count + num_C + 1)


def _prior(mean_R: Array, noise_RR: Array, spread_M: Array, share: float) -> tuple[Array, Array]:
    """Mean and covariance of the candidates' abilities before their own scores are looked at.

    The level that they have in common may lie anywhere within the range of the scores.
    """
    num_M = len(spread_M)
    num_C = len(mean_R) // num_M
    common_R, prior_RR = np.empty_like(mean_R), np.zeros_like(noise_RR)
    for measure, spread in enumerate(spread_M):
        rows = slice(measure * num_C, (measure + 1) * num_C)
        between = _between(mean_R[rows], noise_RR[rows, rows], share)
        common_R[rows] = mean_R[rows].mean()
        prior_RR[rows, rows] = np.eye(num_C) * between + spread**2
    return common_R, prior_RR


def _between(means_C: Array, noise_CC: Array, share: float) -> float:
    """Variance of the candidates' abilities, such that their means shrink by what is expected of them.

    Before, any share of noise in the variance of the means over all documents is as likely (the uniform shrinkage
    prior of Daniels, "A prior for the variance in hierarchical models", 1999). The likelihood is that of the
    means' contrasts, which do not depend on the common level.
    """
    num_C = len(means_C)
    if num_C == 1:
        return 0.0
    # An orthonormal basis of all contrasts: what is orthogonal to the vector of ones.
    contrasts_CK = np.linalg.svd(np.ones((1, num_C)))[2][1:].T
    noise_K, turned_KK = np.linalg.eigh(contrasts_CK.T @ noise_CC @ contrasts_CK)
    found_K = turned_KK.T @ (contrasts_CK.T @ means_C)
    noise = float(noise_K.mean())
    part_G = (np.arange(200) + 0.5) / 200
    between_G = noise * share * (1 - part_G) / part_G
    variance_GK = between_G[:, None] + np.maximum(noise_K, 1e-9 * noise)
    log_G = -0.5 * (np.log(variance_GK) + found_K**2 / variance_GK).sum(axis=1)
    weight_G = np.exp(log_G - log_G.max())
    kept = float((weight_G * between_G / (between_G + noise)).sum() / weight_G.sum())
    return noise * kept / (1 - kept)
