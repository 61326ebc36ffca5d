"""DARE, linear: drop random elements of the task vectors, rescale the rest, add them to the base.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", 2023,
https://arxiv.org/abs/2311.03099

Kept elements are rescaled by 1/density, the paper's rule. mergekit rescales by the ratio of the L1 norms
before and after dropping instead, which differs from 1/density by sampling noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.counter_hash import keep_mask
from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method
from evomerge.merge.methods.task_arithmetic import add_weighted, parameters, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS = parameters(
    normalize=False, density="Chance of each element of the task vector to be kept.", rescale=True
)


def drop_and_rescale(inputs: MergeInputs) -> list[Tensor]:
    """δ_i m_i / p_i with m_i ~ Bernoulli(p_i): equations 2 to 4 of the paper, masks from the counter hash."""
    deltas = task_vectors(inputs)
    for delta, source in zip(deltas, inputs.others, strict=True):
        density = inputs.values[source]["density"]
        if density < 1:
            mask = keep_mask(
                delta.numel(),
                density,
                seed=inputs.seed,
                tensor_name=inputs.name,
                source=source,
                first=inputs.first,
            )
            delta.mul_(mask.view_as(delta))
            if inputs.shared["rescale"]:
                delta.div_(density)
    return deltas


def dare_linear(inputs: MergeInputs) -> Tensor:
    """θ = θ_base + λ Σ w_i m_i δ_i / p_i."""
    return add_weighted(inputs, drop_and_rescale(inputs))


METHOD = Method(
    name="dare_linear",
    title="Linear DARE",
    summary="Drops random elements of the task vectors, rescales the rest and adds them to the base.",
    reference="https://arxiv.org/abs/2311.03099",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    random=True,
    elementwise=True,
    formula=dare_linear,
)
