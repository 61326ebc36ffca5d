"""SLERP: from the base to one other model along the arc between them.

Ken Shoemake, "Animating rotation with quaternion curves", 1985, https://doi.org/10.1145/325165.325242;
https://en.wikipedia.org/wiki/Slerp
"""

from __future__ import annotations

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
from evomerge.merge.methods.combination import merge_by

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

COLLINEAR = 0.9995
"""|cosine| beyond which the arc is taken as straight, as in mergekit."""
TINY_NORM = 1e-8
"""Norm below which a tensor has no direction and is not normalised, as in mergekit."""


def coefficients(gram: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """sin((1-t)φ) / sin φ and sin(tφ) / sin φ, the factors of v_0 and v_1, with φ the angle between them.

    Args:
        gram: Inner products of v_0 and v_1, [2, 2].
        t: 0 gives v_0, 1 gives v_1.
    """
    if not np.isfinite(gram).all():
        return np.full(2, np.nan)
    norm_0, norm_1 = (norm if norm > TINY_NORM else 1.0 for norm in np.sqrt(gram.diagonal()))
    cosine = min(1.0, max(-1.0, gram[0, 1] / norm_0 / norm_1))
    if abs(cosine) > COLLINEAR:
        return np.array([1 - t, t])
    phi = math.acos(cosine)
    return np.array([math.sin((1 - t) * phi), math.sin(t * phi)]) / math.sin(phi)


def combination(inputs: CombinationInputs) -> Combination:
    """c_0 of the base and c_1 of the other model."""
    gram = inputs.gram(GramKind.TENSORS, Axis.WHOLE)
    if inputs.base == 0:
        return Combination(coefficients=coefficients(gram, inputs.shared["t"]))
    return Combination(coefficients=coefficients(gram[::-1, ::-1], inputs.shared["t"])[::-1].copy())


def slerp(inputs: MergeInputs) -> Tensor:
    """θ = [sin((1-t)φ) θ_0 + sin(tφ) θ_1] / sin φ, with φ the angle between the whole tensors."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="slerp",
    title="SLERP",
    summary="Spherical interpolation between the base and one other model.",
    reference="https://doi.org/10.1145/325165.325242",
    parameters=(
        Parameter(
            name="t",
            kind="float",
            scope=Scope.RECIPE,
            required=True,
            description="Position on the arc: 0 is the base, 1 the other model.",
        ),
    ),
    base=BasePolicy.REQUIRED,
    min_others=1,
    max_others=1,
    formula=slerp,
    combination=combination,
    concept="Each tensor moves along the great circle from the base's to the other model's, so that its size "
    "does not shrink half way as it does in an average of vectors that point apart; nearly parallel tensors "
    "are interpolated linearly.",
    when="For a blend of two models, often with `t` varied over depth and between attention and MLP.",
)
