"""Task arithmetic: add weighted task vectors to the base.

Ilharco et al., "Editing Models with Task Arithmetic", 2022, https://arxiv.org/abs/2212.04089

Its parameters and the last step, adding the merged task vector to the base, serve every method built on
task vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor

TINY_SUM = 1e-8
"""Sum of weights below which `normalize` does not divide, as in mergekit."""


def add_weighted(inputs: MergeInputs, deltas: list[Tensor]) -> Tensor:
    """θ = θ_base + λ Σ w_i δ_i, the sum divided by Σ w_i when `normalize`.

    Args:
        inputs: Base, weights, λ and `normalize`.
        deltas: Task vector of every input other than the base, in their order; consumed.
    """
    import torch

    weights = [inputs.values[index]["weight"] for index in inputs.others]
    merged = torch.zeros_like(inputs.base_tensor)
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta.mul_(weight))
    if inputs.shared["normalize"] and abs(sum(weights)) >= TINY_SUM:
        merged.div_(sum(weights))
    return merged.mul_(inputs.shared["lambda"]).add_(inputs.base_tensor)


def task_vectors(inputs: MergeInputs) -> list[Tensor]:
    """δ_i = θ_i - θ_base for every input other than the base."""
    return [inputs.tensors[index] - inputs.base_tensor for index in inputs.others]


def task_arithmetic(inputs: MergeInputs) -> Tensor:
    """θ = θ_base + λ Σ w_i (θ_i - θ_base)."""
    return add_weighted(inputs, task_vectors(inputs))


def parameters(
    *, normalize: bool, density: str | None = None, rescale: bool | None = None
) -> tuple[Parameter, ...]:
    """The parameters of a method on task vectors.

    Args:
        normalize: Default of `normalize`.
        density: What `density` means to the method, or None when it has none.
        rescale: Default of `rescale`, or None when it has none.
    """
    result = [
        Parameter(
            name="weight",
            kind="float",
            scope=Scope.NON_BASE,
            required=True,
            description="Factor of the model's task vector.",
        ),
        Parameter(
            name="normalize",
            kind="bool",
            scope=Scope.RECIPE,
            default=normalize,
            description="Divide the merged task vector by the sum of the weights.",
        ),
        Parameter(
            name="lambda",
            kind="float",
            scope=Scope.RECIPE,
            default=1.0,
            description="Factor of the merged task vector.",
        ),
        Parameter(
            name="int8_mask",
            kind="bool",
            scope=Scope.RECIPE,
            default=False,
            description="Accepted for mergekit's sake; it saves memory there and changes no result.",
        ),
    ]
    if density is not None:
        result.insert(
            1,
            Parameter(
                name="density",
                kind="float",
                scope=Scope.NON_BASE,
                default=1.0,
                low=0.0,
                high=1.0,
                exclude_low=True,
                description=density,
            ),
        )
    if rescale is not None:
        result.append(
            Parameter(
                name="rescale",
                kind="bool",
                scope=Scope.RECIPE,
                default=rescale,
                description="Make up for what was dropped by scaling up what was kept.",
            )
        )
    return tuple(result)


METHOD = Method(
    name="task_arithmetic",
    title="Task arithmetic",
    summary="Adds weighted task vectors to the base.",
    reference="https://arxiv.org/abs/2212.04089",
    parameters=parameters(normalize=False),
    base=BasePolicy.REQUIRED,
    elementwise=True,
    formula=task_arithmetic,
)
