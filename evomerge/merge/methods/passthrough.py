"""Passthrough: the tensors of one model, optionally scaled; the building block of stacked layers.

mergekit's method of the same name, https://github.com/arcee-ai/mergekit#passthrough
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor


def passthrough(inputs: MergeInputs) -> Tensor:
    """θ = s θ_0."""
    scale = inputs.values[0]["scale"]
    return inputs.tensors[0].clone() if scale is None else inputs.tensors[0] * scale


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
    max_models=1,
    elementwise=True,
    formula=passthrough,
)
