"""RAM: average task vectors where they overlap, keep them whole where only one model changed.

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, https://arxiv.org/abs/2601.13572
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = Parameter(
    name="epsilon",
    kind="float",
    scope=Scope.RECIPE,
    default=1e-5,
    low=0.0,
    description="Size up to which a change counts as none.",
)


def changes(inputs: MergeInputs) -> tuple[list[Tensor], Tensor]:
    """The task vectors, 0 up to ε, and per element the number of models that changed it."""
    import torch

    deltas = inputs.task_vectors()
    count = torch.zeros_like(inputs.base_tensor)
    for delta in deltas:
        changed = delta.abs() > inputs.shared["epsilon"]
        count += changed
        delta.mul_(changed)
    return deltas, count


def ram(inputs: MergeInputs) -> Tensor:
    """θ = θ_base + Σ δ_i / n, with n the number of models that changed the element."""
    import torch

    deltas, count = changes(inputs)
    merged = torch.zeros_like(inputs.base_tensor)
    for delta in deltas:
        merged += delta
    return merged.div_(count.clamp_(min=1)).add_(inputs.base_tensor)


METHOD = Method(
    name="ram",
    title="RAM",
    summary="Averages task vectors over the models that changed an element, keeps what one alone changed.",
    reference="https://arxiv.org/abs/2601.13572",
    parameters=(EPSILON,),
    base=BasePolicy.REQUIRED,
    elementwise=True,
    formula=ram,
    concept="Reinforcement learning changes few elements, and different ones for each task. An element is "
    "averaged over the models that changed it, not over all, so that a change made by one model alone is not "
    "diluted.",
    when="For models trained from one base by reinforcement learning, whose task vectors are sparse.",
)
