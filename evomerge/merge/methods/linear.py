"""Linear: the weighted average of the models.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", 2022, https://arxiv.org/abs/2203.05482
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evomerge.merge.methods.base import (
    BasePolicy,
    Combination,
    CombinationInputs,
    MergeInputs,
    Method,
    Parameter,
    Scope,
)
from evomerge.merge.methods.combination import merge_by

if TYPE_CHECKING:
    from torch import Tensor


def combination(inputs: CombinationInputs) -> Combination:
    """θ = Σ w_i θ_i, divided by Σ w_i when `normalize`; weights that sum to 0 have no average."""
    weights = np.array([values["weight"] for values in inputs.values], dtype=np.float64)
    divisor = float(weights.sum()) if inputs.shared["normalize"] else 1.0
    return Combination(coefficients=weights, divisor=divisor)


def linear(inputs: MergeInputs) -> Tensor:
    """The weighted average of the models."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="linear",
    title="Linear",
    summary="Weighted average of the models.",
    reference="https://arxiv.org/abs/2203.05482",
    parameters=(
        Parameter(
            name="weight",
            kind="float",
            scope=Scope.MODEL,
            required=True,
            description="Share of the model in the average.",
        ),
        Parameter(
            name="normalize",
            kind="bool",
            scope=Scope.RECIPE,
            default=True,
            description="Divide by the sum of the weights.",
        ),
    ),
    base=BasePolicy.IGNORED,
    elementwise=True,
    formula=linear,
    combination=combination,
    concept="Each tensor is the average of the models' tensors, weighted by model.",
    when="The first thing to try with models fine-tuned from one base, in particular on the same task.",
)
