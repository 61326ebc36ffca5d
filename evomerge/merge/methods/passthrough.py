"""Passthrough: the tensors of one model, optionally scaled; the building block of stacked layers.

mergekit's method of the same name, https://github.com/arcee-ai/mergekit#passthrough
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
    """The scale; exactly 1 without one, so that every bit passes."""
    scale = inputs.values[0]["scale"]
    return Combination(coefficients=np.array([1.0 if scale is None else scale]))


def passthrough(inputs: MergeInputs) -> Tensor:
    """θ = s θ_0."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="passthrough",
    title="Passthrough",
    summary="Copies the tensors of one model, optionally scaled.",
    reference="https://github.com/arcee-ai/mergekit#passthrough",
    parameters=(
        Parameter(
            name="scale",
            kind="float",
            scope=Scope.MODEL,
            default=None,
            description="Factor of the tensor; none by default.",
        ),
    ),
    base=BasePolicy.IGNORED,
    max_others=1,
    elementwise=True,
    formula=passthrough,
    combination=combination,
    concept="The tensors pass as they are, or multiplied by a number per tensor.",
    when="To stack layers of one or several models in the `slices` form, each slice from a single model.",
)
