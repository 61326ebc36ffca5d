"""SCE: select the elements that differ most between the models, calculate weights, erase minority signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, https://arxiv.org/abs/2408.07990
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6
"""Sum of mean squares below which all models count alike, and least sum of weights, as in mergekit."""


def most_varied(variance: Tensor, share: float) -> Tensor:
    """Mask of the `share` of the elements above 0 that are largest; of equal ones, the first in the tensor."""
    import torch

    num_kept = int(variance.count_nonzero() * share)
    if num_kept == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    flat = variance.flatten()
    cut = flat.kthvalue(flat.numel() - num_kept + 1).values
    kept = flat > cut
    at_cut = (flat == cut).nonzero().flatten()
    kept[at_cut[: num_kept - int(kept.sum())]] = True
    return kept.view_as(variance)


def sce(inputs: MergeInputs) -> Tensor:
    """θ = θ_base + Σ_{i agrees} η_i δ_i / Σ_{i agrees} η_i: section 3.3 of the paper, sources M.

    Of the task vectors the elements of largest variance over the models are kept (select); η_i is the share
    of model i in the sum of their mean squares (calculate); a model agrees where its sign is that of Σ δ_i,
    positive when it is 0 (erase).
    """
    import torch

    if not inputs.others:
        return inputs.base_tensor.clone()
    deltas = torch.stack(inputs.task_vectors())
    if inputs.shared["select_topk"] < 1:
        deltas *= most_varied(deltas.var(dim=0, correction=0), inputs.shared["select_topk"])
    squares = deltas.square().flatten(start_dim=1).mean(dim=1) if deltas.dim() > 1 else deltas.square()
    total = squares.sum()
    eta = torch.full_like(squares, 1 / len(squares)) if total < TINY else squares / total
    elected = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    weights = eta.view(-1, *[1] * inputs.base_tensor.dim()) * (deltas.sign() == elected)
    merged = (deltas * weights).sum(dim=0)
    return merged.div_(weights.sum(dim=0).clamp_(min=TINY)).add_(inputs.base_tensor)


METHOD = Method(
    name="sce",
    title="SCE",
    summary="Selects elements by variance, weights models by the size of their change, erases minority signs.",
    reference="https://arxiv.org/abs/2408.07990",
    parameters=(
        Parameter(
            name="int8_mask",
            kind="bool",
            scope=Scope.RECIPE,
            default=False,
            description="Accepted for mergekit's sake; it saves memory there and changes no result.",
        ),
        Parameter(
            name="select_topk",
            kind="float",
            scope=Scope.RECIPE,
            default=1.0,
            low=0.0,
            high=1.0,
            description="Share of the elements that differ between the models to keep, most different first.",
        ),
    ),
    base=BasePolicy.REQUIRED,
    formula=sce,
    concept="Select, calculate, erase: the elements whose changes vary most between the models are kept, each "
    "model counts by the mean square of its task vector in the tensor, and changes whose sign differs from that "
    "of their sum are left out. Tensors whose mean squares add up to less than 1e-6 weigh all models alike.",
    when="For several models fine-tuned from one base on different tasks, without weights to choose.",
    differences="Of elements with exactly the variance at which the selection ends, those first in the tensor "
    "are kept; mergekit keeps whichever its sort puts first.",
)
