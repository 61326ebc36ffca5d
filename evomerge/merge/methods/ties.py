"""TIES: trim task vectors, elect a sign per element, merge what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023,
https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.counter_hash import hash_elements, keys, threshold
from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method
from evomerge.merge.methods.task_arithmetic import parameters, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

TINY_NORM = 1e-7
"""L1 norm below which a trimmed task vector is not rescaled, as in mergekit."""


def trim(delta: Tensor, density: float, *, seed: int, tensor_name: str, source: int) -> Tensor:
    """Keep the `density` share of the elements that are largest in magnitude, set the others to 0.

    Of elements as large as the threshold itself, which are many when weights are stored in bfloat16, the
    counter hash picks as many as the density asks for.

    Args:
        delta: Task vector of any shape; changed in place.
        density: Share to keep, in (0, 1].
        seed: The recipe's seed.
        tensor_name: Name of the output tensor.
        source: Position of the source among the recipe's inputs.
    """
    import torch

    count = delta.numel()
    if density >= 1 or count == 0:
        return delta
    num_kept = max(1, int(density * count))
    magnitude = delta.abs().flatten()
    cut = torch.kthvalue(magnitude, count - num_kept + 1).values
    kept = magnitude > cut
    at_cut = (magnitude == cut).nonzero().flatten()
    missing = num_kept - int(kept.sum())
    if missing < at_cut.numel():
        share = threshold(missing / at_cut.numel())
        at_cut = at_cut[hash_elements(at_cut, *keys(seed, tensor_name, source)) < share]
    kept[at_cut] = True
    return delta.mul_(kept.view_as(delta))


def elect_and_merge(inputs: MergeInputs, deltas: list[Tensor]) -> Tensor:
    """θ = θ_base + λ Σ_{i agrees} w_i δ_i, per element divided by the weights that agree when `normalize`.

    The elected sign of an element is that of Σ w_i δ_i (positive when it is 0); a source agrees where
    w_i δ_i has the elected sign.

    Args:
        inputs: Base, weights, λ and `normalize`.
        deltas: Trimmed task vector of every input other than the base, in their order; consumed.
    """
    import torch

    weights = [inputs.values[index]["weight"] for index in inputs.others]
    for delta, weight in zip(deltas, weights, strict=True):
        delta.mul_(weight)
    total = torch.zeros_like(inputs.base_tensor)
    for delta in deltas:
        total.add_(delta)
    elected = torch.where(total >= 0, 1.0, -1.0)
    merged = total.zero_()
    divisor = torch.zeros_like(merged) if inputs.shared["normalize"] else None
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() == elected
        merged.add_(delta.mul_(agrees))
        if divisor is not None:
            divisor.add_(agrees, alpha=weight)
    if divisor is not None:
        merged.div_(torch.where(divisor == 0, 1.0, divisor))
    return merged.mul_(inputs.shared["lambda"]).add_(inputs.base_tensor)


def ties(inputs: MergeInputs) -> Tensor:
    """Trim, elect, merge: sections 4.1 to 4.3 of the paper."""
    deltas = task_vectors(inputs)
    for delta, source in zip(deltas, inputs.others, strict=True):
        before = delta.abs().sum() if inputs.shared["rescale"] else None
        density = inputs.values[source]["density"]
        trim(delta, density, seed=inputs.seed, tensor_name=inputs.name, source=source)
        if before is not None:
            after = delta.abs().sum()
            if before >= TINY_NORM and after >= TINY_NORM:
                delta.mul_(before / after)
    return elect_and_merge(inputs, deltas)


METHOD = Method(
    name="ties",
    title="TIES",
    summary="Trims task vectors to their largest elements, elects a sign per element, merges what agrees.",
    reference="https://arxiv.org/abs/2306.01708",
    parameters=parameters(
        normalize=True, density="Share of the task vector's elements to keep, largest first.", rescale=False
    ),
    base=BasePolicy.REQUIRED,
    formula=ties,
)
