"""How exact a merged element can be: the size of its summands, and choices that rounding or a bin makes.

Choices are found from the plan's parameters and the sources by short formulas of their own. Sizes are found
with the coefficients that our methods state: a wrong one makes an error a million times the allowance.

Legend: E elements of a tensor, ranks of magnitudes count from 0, the smallest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merge.bank import Bank
from evomerge.merge.execute import prepare_tensor
from evomerge.merge.histogram import BIN_SHIFT
from evomerge.merge.methods.base import Axis, Combination
from evomerge.merge.methods.task_vectors import TaskVectorSum
from evomerge.merge.plan import TensorPlan

ROUNDING = 2.0**-20
"""Sum over sum of magnitudes below which float32 may get the sign of a sum wrong: a few roundings."""


@dataclass(frozen=True, kw_only=True)
class Trim:
    """What trimming does to one task vector.

    Attributes:
        kept: Elements it keeps, of equal ones those that a sort puts last.
        split: Elements, not 0, of the bins that a threshold divides: one more or less of them may be kept.
        spread: How much the L1 norm of what is kept may differ by the choice among them, relative to it.
    """

    kept: Tensor
    split: Tensor
    spread: float


def trim(delta: Tensor, first: int, end: int) -> Trim:
    """Keep the ranks first <= r < end of a float32 task vector."""
    magnitudes, order = delta.abs().flatten().sort(stable=True)
    bins = magnitudes.view(torch.int32) >> BIN_SHIFT
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[order[first:end]] = True
    split = torch.zeros_like(kept)
    norm, spread = float(magnitudes[first:end].double().sum()), 0.0
    for place in {first, end} - {0, delta.numel()}:
        if bins[place - 1] != bins[place] or magnitudes[place] == 0:
            continue
        members = bins == bins[place]
        split[order[members]] = True
        inside = int(members[first:end].sum())
        width = float(magnitudes[members].max() - magnitudes[members].min())
        spread += width * min(inside, int(members.sum()) - inside) / norm
    return Trim(kept=kept.view_as(delta), split=split.view_as(delta), spread=spread)


def trims(plan: TensorPlan, bank: Bank) -> Iterator[tuple[int, Trim | None]]:
    """Position of every task vector's model with what trimming does to it; None when it keeps everything."""
    size = math.prod(plan.shape)
    for index, values in enumerate(plan.values):
        if index == plan.base:
            continue
        density = values.get("density", 1.0)
        if density >= 1:
            yield index, None
            continue
        num_kept = max(1, int(density * size))
        first = max(0, size - num_kept - int(values.get("gamma", 0.0) * size))
        yield index, trim(_delta(plan, bank, index), first, first + num_kept)


def _delta(plan: TensorPlan, bank: Bank, index: int) -> Tensor:
    assert plan.base is not None
    return bank.tensor(plan.inputs[index]).float() - bank.tensor(plan.inputs[plan.base]).float()


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """What can be asked of the elements of one merged tensor.

    Attributes:
        size: Sum of the magnitudes of the numbers each is added up from, float64.
        undecided: Elements that depend on a choice that may fall either way: the boundary bin of a trimming
            threshold, the sign of a sum that float32 cannot tell from 0, a score at a threshold.
        slack: What such choices change elsewhere in the tensor: by the factor that rescales what is kept, or
            by a model's weight that depends on its elements.
    """

    size: Tensor
    undecided: Tensor
    slack: Tensor


def exactness(plan: TensorPlan, bank: Bank, merged: Tensor) -> Exactness:
    """Work out what can be asked.

    Args:
        plan: The plan, of a method without randomness at these parameters.
        bank: The sources.
        merged: The float64 result.
    """
    tensors = [bank.tensor(key).double() for key in plan.inputs]
    nothing = torch.zeros(plan.shape, dtype=torch.bool)
    operation = prepare_tensor(plan, bank).operation
    if isinstance(operation, Combination):
        size = _combination_size(operation, tensors, plan)
        return Exactness(size=size, undecided=nothing, slack=nothing.double())
    assert plan.base is not None
    base = tensors[plan.base]
    deltas = [tensor - base for index, tensor in enumerate(tensors) if index != plan.base]
    if isinstance(operation, TaskVectorSum):
        return _task_vector_exactness(plan, bank, operation, merged)
    gain = 1 + abs(plan.shared.get("r", 0.0)) * plan.shared.get("alpha", 0.0)
    change = gain * sum((delta.abs() for delta in deltas), nothing.double())
    undecided, slack = nothing, nothing.double()
    if plan.method.name == "sce" and plan.shared["select_topk"] < 1 and deltas:
        undecided, spread = _at_variance_cut(torch.stack(deltas), plan.shared["select_topk"])
        slack = 2 * spread * change
    if plan.method.name == "arcee_fusion":
        undecided = _at_importance_threshold(deltas[0], base)
    return Exactness(size=base.abs() + change, undecided=undecided, slack=slack)


def _combination_size(operation: Combination, tensors: Sequence[Tensor], plan: TensorPlan) -> Tensor:
    coefficients = torch.from_numpy(operation.coefficients.copy()).abs() / abs(operation.divisor)
    base = tensors[plan.base] if operation.around_base and plan.base is not None else None
    size = torch.zeros_like(tensors[0]) if base is None else base.abs()
    for index, tensor in enumerate(tensors):
        c = coefficients[..., index]
        if operation.axis is Axis.ROWS:
            c = c.view(*plan.shape[:-1], 1)
        elif operation.axis is Axis.COLUMNS:
            c = c.view(1, *plan.shape[1:])
        size = size + c * (tensor if base is None else tensor - base).abs()
    return size


def _task_vector_exactness(
    plan: TensorPlan, bank: Bank, operation: TaskVectorSum, merged: Tensor
) -> Exactness:
    assert plan.base is not None
    base = bank.tensor(plan.inputs[plan.base]).double()
    undecided = torch.zeros(plan.shape, dtype=torch.bool)
    total, size = torch.zeros_like(base), torch.zeros_like(base)
    spread = 0.0
    factors = {term.source: term.factor for term in operation.terms}
    weights = [term.weight for term in operation.terms]
    for index, trimmed in trims(plan, bank):
        term = factors[index] * _delta(plan, bank, index).double()
        if trimmed is not None:
            undecided |= trimmed.split
            term = term * trimmed.kept
            spread = max(spread, trimmed.spread if plan.shared.get("rescale") else 0.0)
        total, size = total + term, size + term.abs()
    if operation.elect:
        undecided |= (total.abs() <= max(ROUNDING, 2 * spread) * size) & (size > 0)
        # All that is added has one sign; but the weights it is divided by may differ in theirs.
        size = _cancellation(weights if operation.normalize else []) * (merged - base).abs()
    else:
        size = size * abs(operation.scale / operation.divisor)
        size = size * _cancellation(weights if operation.normalize else [], whole=True)
    return Exactness(size=base.abs() + size, undecided=undecided, slack=spread * size)


def _cancellation(weights: Sequence[float], *, whole: bool = False) -> float:
    """The largest ratio of Σ |w| to |Σ w|, over all selections of weights or all of them together."""
    worst = 1.0
    for count in [len(weights)] if whole else range(1, len(weights) + 1):
        for some in itertools.combinations(weights, count):
            if abs(sum(some)) > 1e-8:
                worst = max(worst, sum(map(abs, some)) / abs(sum(some)))
    return worst


def _at_variance_cut(deltas: Tensor, share: float) -> tuple[Tensor, float]:
    """Elements whose variance is that at which SCE's selection ends, up to rounding.

    Also, by how much the choice among them changes a model's sum of squares, relative to it, at most.
    """
    variance = deltas.var(dim=0, correction=0)
    num_kept = int(int(variance.count_nonzero()) * share)
    if num_kept == 0:
        return torch.zeros_like(variance, dtype=torch.bool), 0.0
    cut = variance.flatten().sort(descending=True).values[num_kept - 1]
    at_cut = (variance - cut).abs() <= 1e-5 * cut
    num_chosen = num_kept - int((variance > cut * (1 + 1e-5)).sum())
    num_choices = min(num_chosen, int(at_cut.sum()) - num_chosen)
    squares = deltas[:, at_cut].square()
    change = num_choices * (squares.amax(dim=1) - squares.amin(dim=1))
    kept = deltas[:, variance >= cut].square().sum(dim=1)
    return at_cut, float((change / kept.clamp(min=1e-30)).max())


def _at_importance_threshold(delta: Tensor, base: Tensor) -> Tensor:
    """Elements whose importance to Arcee Fusion is its threshold, up to rounding.

    A divergence is a sum of terms as large as the change of a probability, of which little is left.
    """
    p, q = (torch.softmax(tensor, dim=-1) + 1e-8 for tensor in (base + delta, base))
    terms = p * torch.log(p / q)
    scores = delta.abs() * terms.sum(dim=-1, keepdim=True)
    noise = delta.abs() * 2e-7 * terms.shape[-1] ** 0.5 * p.amax(dim=-1, keepdim=True)
    ranked = scores.flatten().sort().values
    first, median, third = (ranked[quarter * (ranked.numel() - 1) // 4] for quarter in (1, 2, 3))
    threshold = median + 1.5 * (third - first)
    return (scores - threshold).abs() <= noise + noise.max()


def unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of a type at the magnitude of a float64 value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)
