"""NearSwap: swap in the other model's elements where they are near the base's.

alchemonaut, model card of QuartetAnemoi-70B-t0.0001, 2024,
https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor

TINY_DISTANCE = 1e-6
"""Distance that stands in for every smaller one, as in mergekit."""


def nearswap(inputs: MergeInputs) -> Tensor:
    """θ = w θ_1 + (1-w) θ_base, with w = t / |θ_1 - θ_base| but at most 1, per element."""
    (other,) = inputs.others
    base, tensor = inputs.base_tensor, inputs.tensors[other]
    distance = (base - tensor).abs_().clamp_(min=TINY_DISTANCE)
    weight = distance.reciprocal_().mul_(inputs.shared["t"]).clamp_(0.0, 1.0)
    return (weight * tensor).add_((1 - weight).mul_(base))


METHOD = Method(
    name="nearswap",
    title="NearSwap",
    summary="Takes the other model's elements where they differ little from the base's.",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=(
        Parameter(
            name="t",
            kind="float",
            scope=Scope.RECIPE,
            required=True,
            low=0.0,
            description="Distance up to which an element is swapped; beyond it, each element moves by t.",
        ),
    ),
    base=BasePolicy.REQUIRED,
    min_others=1,
    max_others=1,
    elementwise=True,
    formula=nearswap,
    concept="Each element moves from the base's value towards the other model's, but no further than `t`: "
    "where both are nearer to each other than that, the other model's value is taken.",
    when="To season a model that should stay what it is with a second one, with `t` about as large as typical "
    "differences between their elements.",
)
