"""Karcher mean: the point on the sphere with the least sum of squared arcs to all models.

Wang, Ye and Yin, "Functionality-Oriented LLM Merging on the Fisher-Rao Manifold", 2026,
https://arxiv.org/abs/2603.04972; the iteration is that of Hermann Karcher, "Riemannian center of mass and
mollifier smoothing", 1977, https://doi.org/10.1002/cpa.3160300502

Every iterate is a combination of the models' directions, so the iteration runs on its coefficients.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from evomerge.merge.methods.base import (
    Axis,
    BasePolicy,
    Combination,
    CombinationInputs,
    GramKind,
    MergeInputs,
    Method,
    Parameter,
    Scope,
)
from evomerge.merge.methods.combination import NO_DIRECTION, SAME_DIRECTION, merge_by

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def coefficients(gram: NDArray[np.float64], max_iter: int, tol: float) -> NDArray[np.float64]:
    """Factors of the vectors in their Karcher mean, scaled to the mean of their norms.

    Args:
        gram: Inner products of the vectors, [N, N].
        max_iter: Most steps.
        tol: Length of a step at which to stop; norm up to which a vector has no direction.
    """
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan)
    norms = np.sqrt(gram.diagonal())
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(gram))
    units = gram[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
    result = np.zeros(len(gram))
    result[valid] = _direction(units, max_iter, tol) / norms[valid] * norms.mean()
    return result


def _direction(units: NDArray[np.float64], max_iter: int, tol: float) -> NDArray[np.float64]:
    """The factors a_i of the Karcher mean m = Σ a_i u_i of unit vectors with the inner products `units`."""

    def norm(a: NDArray[np.float64]) -> float:
        return math.sqrt(max(0.0, float(a @ units @ a)))

    identity = np.eye(len(units))
    a = np.full(len(units), 1 / len(units))
    length = norm(a)
    a = identity[0] if length < max(tol, NO_DIRECTION) else a / length
    for _ in range(max_iter):
        dots = np.clip(units @ a, -1.0, 1.0)
        # Logarithm of u_i at m: its arc θ_i, towards the part of u_i across m. What lies opposite to m is
        # pulled to all sides alike; what is closer than `tol` is there.
        theta, sine = np.arccos(dots), np.sqrt(1 - dots**2)
        pulls = (theta >= tol) & ~((dots < 0) & (sine**2 <= SAME_DIRECTION))
        ratio = np.divide(theta, sine, out=np.ones_like(theta), where=sine > 0)
        step = (pulls * ratio) @ (identity - np.outer(dots, a)) / len(units)
        length = norm(step)
        if length < tol or length == 0:
            break
        # Exponential map: along the great circle.
        a = math.cos(length) * a + math.sin(length) / length * step
        a = a / norm(a)
    return a


def combination(inputs: CombinationInputs) -> Combination:
    """All models count alike, a base among them; a single one stays as it is."""
    if inputs.num_inputs == 1:
        return Combination(coefficients=np.ones(1))
    gram = inputs.gram(GramKind.TENSORS, Axis.WHOLE)
    return Combination(
        coefficients=_known(gram.tobytes(), len(gram), inputs.shared["max_iter"], inputs.shared["tol"])
    )


@functools.lru_cache(maxsize=1 << 14)
def _known(gram: bytes, size: int, max_iter: int, tol: float) -> NDArray[np.float64]:
    """The coefficients of inner products that are the same for every candidate."""
    return coefficients(np.frombuffer(gram).reshape(size, size), max_iter, tol)


def karcher(inputs: MergeInputs) -> Tensor:
    """θ = (Σ |θ_i| / N) argmin_{|m| = 1} Σ arc(m, θ_i / |θ_i|)²."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="karcher",
    title="Karcher mean",
    summary="Mean of the models on the sphere, at their mean size.",
    reference="https://arxiv.org/abs/2603.04972",
    parameters=(
        Parameter(
            name="max_iter",
            kind="int",
            scope=Scope.RECIPE,
            default=10,
            low=0,
            description="Most steps of the iteration.",
        ),
        Parameter(
            name="tol",
            kind="float",
            scope=Scope.RECIPE,
            default=1e-5,
            low=0.0,
            description="Length of a step at which the iteration stops, in radians.",
        ),
    ),
    base=BasePolicy.IGNORED,
    formula=karcher,
    combination=combination,
    concept="Each tensor takes the direction whose squared arcs to the models' directions have the least sum, "
    "found by an iteration, and the mean of their norms. All models count alike.",
    when="To average several models, also of different origin, without weights to choose.",
    differences="The iteration runs in float64. A model exactly opposite to the mean, which pulls it to all "
    "sides alike, is passed over in that step; in mergekit rounding decides where it pulls.",
)
