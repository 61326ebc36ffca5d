"""RAM+, tensor-local: RAM with what one model alone changed made stronger, the more the models overlap.

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, https://arxiv.org/abs/2601.13572

The paper counts shared and unique elements over the whole model; this form counts them tensor by tensor, as
mergekit does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope
from evomerge.merge.methods.ram import EPSILON, changes

if TYPE_CHECKING:
    from torch import Tensor


def ramplus_tl(inputs: MergeInputs) -> Tensor:
    """θ = θ_base + Σ δ_i / n where n > 1 models changed the element, + λ_i δ_i where only model i did.

    λ_i = 1 + r min(rho_i, alpha), with rho_i the ratio of shared to unique elements among those model i changed.
    """
    import torch

    deltas, count = changes(inputs)
    shared, unique = count > 1, count == 1
    merged = torch.zeros_like(inputs.base_tensor)
    for delta in deltas:
        num_shared, num_unique = (int((delta * elements).count_nonzero()) for elements in (shared, unique))
        ratio = num_shared / max(num_unique, 1)  # without unique elements it multiplies nothing
        strength = 1 + inputs.shared["r"] * min(ratio, inputs.shared["alpha"])
        merged += delta.mul_(torch.where(unique, strength, 1 / count.clamp(min=1)))
    return merged.add_(inputs.base_tensor)


METHOD = Method(
    name="ramplus_tl",
    title="RAM+ (tensor-local)",
    summary="RAM, with what one model alone changed made stronger.",
    reference="https://arxiv.org/abs/2601.13572",
    parameters=(
        Parameter(
            name="r",
            kind="float",
            scope=Scope.RECIPE,
            default=0.1,
            description="How much overlap strengthens what is unique.",
        ),
        Parameter(
            name="alpha",
            kind="float",
            scope=Scope.RECIPE,
            default=0.2,
            low=0.0,
            description="Ratio of shared to unique elements from which on it counts no more.",
        ),
        EPSILON,
    ),
    base=BasePolicy.REQUIRED,
    formula=ramplus_tl,
    concept="As RAM; besides, what one model alone changed is multiplied by up to 1 + r alpha, the more of that "
    "model's changes are shared with others and so averaged, to make up for what is lost there.",
    when="As RAM, when the models' changes overlap more.",
)
