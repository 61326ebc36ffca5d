"""Arcee Fusion: take over the changes that stand out, leave the others at the base.

Arcee AI, "Arcee Fusion", mergekit's method of the same name, 2025,
https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8
"""Added to probabilities, as in mergekit."""


def importance(tensor: Tensor, base: Tensor) -> Tensor:
    """|θ_1 - θ_base| KL(p ‖ q), with p and q the softmax of each tensor's vectors along the last dimension."""
    import torch

    p = torch.softmax(tensor, dim=-1) + EPSILON
    q = torch.softmax(base, dim=-1) + EPSILON
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    return (tensor - base).abs() * divergence


def outlier_threshold(scores: Tensor) -> Tensor:
    """Median + 1.5 (third - first quartile), each the element at that rank, rounded down."""
    flat = scores.flatten()
    last = flat.numel() - 1
    first, median, third = (flat.kthvalue(quarters * last // 4 + 1).values for quarters in (1, 2, 3))
    return median + 1.5 * (third - first)


def arcee_fusion(inputs: MergeInputs) -> Tensor:
    """θ = θ_base + m (θ_1 - θ_base), with m = 1 where the importance reaches the threshold, else 0."""
    (other,) = inputs.others
    base, tensor = inputs.base_tensor, inputs.tensors[other]
    if base.numel() == 0:
        return base.clone()
    scores = importance(tensor, base)
    return (tensor - base).mul_(scores >= outlier_threshold(scores)).add_(base)


METHOD = Method(
    name="arcee_fusion",
    title="Arcee Fusion",
    summary="Takes over the other model's changes where their importance stands out.",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    parameters=(),
    base=BasePolicy.REQUIRED,
    min_others=1,
    max_others=1,
    formula=arcee_fusion,
    concept="The importance of a change is its size times the divergence between the two models' rows, each "
    "read as a distribution by a softmax. Changes at least as important as the median plus one and a half "
    "times the distance between the quartiles are taken over whole, the others not at all.",
    when="To bring what is most particular to one model into another; there is nothing to tune.",
    differences="The quartiles are those of the whole tensor. mergekit estimates them from a random sample in "
    "tensors of more than a million elements, so that its merges differ from run to run there.",
)
