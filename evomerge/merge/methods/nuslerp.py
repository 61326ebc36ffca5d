"""NuSLERP: SLERP between two models by their weights, of whole tensors or vector by vector.

Charles Goddard, mergekit's method of the same name, 2024,
https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md; the arc as in Ken Shoemake, "Animating
rotation with quaternion curves", 1985, https://doi.org/10.1145/325165.325242
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evomerge.merge.methods.base import (
    Axis,
    BasePolicy,
    Combination,
    CombinationInputs,
    MergeInputs,
    Method,
    Parameter,
    Scope,
)
from evomerge.merge.methods.combination import SAME_DIRECTION, gram_of_others, merge_by, sum_of_others

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

TINY_NORM = 1e-7
"""Norm below which a vector is shorter than 1 after normalisation, as in mergekit."""
TINY_SUM = 1e-6
"""Sum of the weights below which both models count alike, as in mergekit."""


@np.errstate(invalid="ignore")  # what is not finite becomes NaN, in silence
def coefficients(gram: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """sin((1-t)φ) / sin φ and sin(tφ) / sin φ per pair of vectors, 1-t and t where they are collinear.

    Args:
        gram: Inner products of v_0 and v_1, [..., 2, 2].
        t: 0 gives v_0, 1 gives v_1.

    Returns:
        Factors of v_0 and v_1, [..., 2].
    """
    norms = np.maximum(np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)), TINY_NORM)
    cosine = np.clip(gram[..., 0, 1] / norms[..., 0] / norms[..., 1], -1.0, 1.0)
    collinear = 1 - cosine**2 <= SAME_DIRECTION
    phi = np.arccos(np.where(collinear, 0.0, cosine))
    sine = np.where(collinear, 1.0, np.sin(phi))
    c_0 = np.where(collinear, 1 - t, np.sin((1 - t) * phi) / sine)
    c_1 = np.where(collinear, t, np.sin(t * phi) / sine)
    return np.stack([c_0, c_1], axis=-1)


def combination(inputs: CombinationInputs) -> Combination:
    """The arc at t = w_1 / (w_0 + w_1): of the whole tensors, or vector by vector along one dimension."""
    w_0, w_1 = (inputs.values[index]["weight"] for index in inputs.others)
    t = 0.5 if abs(w_0 + w_1) < TINY_SUM else w_1 / (w_0 + w_1)
    axis = Axis.COLUMNS if inputs.shared["nuslerp_row_wise"] else Axis.ROWS
    if inputs.shared["nuslerp_flatten"]:
        axis = Axis.WHOLE
    return sum_of_others(inputs, coefficients(gram_of_others(inputs, axis), t), axis)


def nuslerp(inputs: MergeInputs) -> Tensor:
    """θ = [sin((1-t)φ) v_0 + sin(tφ) v_1] / sin φ of models, or θ_base + that of task vectors."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="nuslerp",
    title="NuSLERP",
    summary="Spherical interpolation between two models, or between their task vectors, by weight.",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    parameters=(
        Parameter(
            name="weight",
            kind="float",
            scope=Scope.NON_BASE,
            required=True,
            description="Share of the model: t is the second one's weight over the sum of both.",
        ),
        Parameter(
            name="nuslerp_flatten",
            kind="bool",
            scope=Scope.RECIPE,
            default=True,
            description="Take one angle between the whole tensors, not one per row or column.",
        ),
        Parameter(
            name="nuslerp_row_wise",
            kind="bool",
            scope=Scope.RECIPE,
            default=False,
            description="Unless flattened, take the vectors along the first dimension, not along the last.",
        ),
    ),
    base=BasePolicy.OPTIONAL,
    min_others=2,
    max_others=2,
    formula=nuslerp,
    combination=combination,
    concept="SLERP with both ends named by weights. With a base model the arc runs between the task vectors, "
    "and the result is added to the base; the angle is that of the whole tensors, or one per row or column.",
    when="For a blend of two models of one family: with a base, their changes are blended rather than the "
    "weights that they share.",
    differences="Vectors that are opposite but for rounding, between which there are many arcs, are interpolated "
    "linearly; in mergekit rounding decides whether they are, or are scaled up.",
)
