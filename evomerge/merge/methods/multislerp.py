"""Multi-SLERP: the weighted mean direction of any number of models, at their mean size.

Charles Goddard, "Multi-SLERP", 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

The article moves from the normalised mean m of the unit vectors u_i along Σ w_i (u_i - (u_i m) m), their mean in
the tangent space there. At that very point this step is 0, since Σ w_i u_i is a multiple of m; what remains is
the direction of the mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from evomerge.errors import EvomergeError
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
from evomerge.merge.methods.combination import NO_DIRECTION, gram_of_others, merge_by, sum_of_others

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def coefficients(gram: NDArray[np.float64], weights: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    """Factors of the vectors v_i in (Σ w_i |v_i|) m / |m| with m = Σ w_i u_i and u_i = v_i / (|v_i| + eps).

    Args:
        gram: Inner products of the vectors, [N, N].
        weights: w, [N].
        eps: Norm below which m has no direction; also what keeps a vector of 0 from dividing by 0.

    Raises:
        ValueError: m is 0 although some v_i are not, and there are more than two of them. Two vectors, and
            vectors that are all 0, are added up by weight instead.
    """
    if not np.isfinite(gram).all():
        return np.full(len(weights), np.nan)
    norms = np.sqrt(gram.diagonal())
    lengths = norms + eps
    per_unit = np.divide(weights, lengths, out=np.zeros_like(weights), where=lengths > 0)
    norm_m = math.sqrt(max(0.0, float(per_unit @ gram @ per_unit)))
    if norm_m < max(eps, NO_DIRECTION):
        if len(weights) > 2 and norms.any():
            raise ValueError("the weights balance the models out, and their mean has no direction")
        return weights
    # The tangent step has the length 0 + eps.
    return per_unit * (weights @ norms * math.cos(eps) / norm_m)


def combination(inputs: CombinationInputs) -> Combination:
    """Mean of the task vectors, or of the models when there is no base; a single model stays as it is."""
    if len(inputs.others) == 1:
        return Combination(coefficients=np.eye(inputs.num_inputs)[inputs.others[0]])
    weights = np.array([inputs.values[index]["weight"] for index in inputs.others], dtype=np.float64)
    try:
        if inputs.shared["normalize_weights"]:
            if weights.sum() == 0:
                raise ValueError("the weights sum to 0 and cannot be normalised")
            weights /= weights.sum()
        found = coefficients(gram_of_others(inputs, Axis.WHOLE), weights, inputs.shared["eps"])
    except ValueError as error:
        raise EvomergeError(f"{inputs.name}: multislerp: {error}; change the weights") from None
    return sum_of_others(inputs, found)


def multislerp(inputs: MergeInputs) -> Tensor:
    """θ = (Σ w_i |θ_i|) m / |m| with m = Σ w_i θ_i / |θ_i|; of task vectors, added to the base, if there is one."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="multislerp",
    title="Multi-SLERP",
    summary="Weighted mean on the sphere of any number of models or task vectors.",
    reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=(
        Parameter(
            name="weight",
            kind="float",
            scope=Scope.NON_BASE,
            required=True,
            description="Share of the model in the mean.",
        ),
        Parameter(
            name="normalize_weights",
            kind="bool",
            scope=Scope.RECIPE,
            default=True,
            description="Divide the weights by their sum.",
        ),
        Parameter(
            name="eps",
            kind="float",
            scope=Scope.RECIPE,
            default=1e-8,
            low=0.0,
            description="Small number that keeps divisions finite.",
        ),
    ),
    base=BasePolicy.OPTIONAL,
    min_others=1,
    formula=multislerp,
    combination=combination,
    concept="Directions and sizes are averaged apart: the result points along the weighted mean of the unit "
    "vectors and has the weighted mean of the norms. With a base model this is done to the task vectors.",
    when="To blend more than two models without the shrinking of a plain average.",
    differences="Where all models equal the base in a tensor, it stays as it is; mergekit stops with an error. "
    f"Where the mean of the unit vectors is shorter than {NO_DIRECTION:g}, so that rounding would decide its "
    "direction, it counts as 0: an error that names the tensor, or with two models their weighted sum. The "
    "same error takes the place of NaN when the weights to be normalised sum to 0.",
)
