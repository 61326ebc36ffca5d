"""Linear: the weighted average of the models.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", 2022, https://arxiv.org/abs/2203.05482
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor


def linear(inputs: MergeInputs) -> Tensor:
    """θ = Σ w_i θ_i, divided by Σ w_i when `normalize`."""
    import torch

    weights = [values["weight"] for values in inputs.values]
    result = torch.zeros_like(inputs.tensors[0])
    for tensor, weight in zip(inputs.tensors, weights, strict=True):
        result.add_(tensor, alpha=weight)
    if inputs.shared["normalize"]:
        result.div_(sum(weights))
    return result


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
)
