"""Methods on task vectors: δ_i = θ_i - θ_base, sparsified, summed or elected, and added to the base.

Task arithmetic, TIES, DARE, DELLA, Model Breadcrumbs and their mixtures differ in two choices only: what is
kept of each task vector, and whether the signs of the sum decide what is added. A method states these as a
`TaskVectorSum`; `merge_task_vectors` carries it out in torch and is the reference of the kernels.

Legend: N task vectors, E elements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from evomerge.merge.counter_hash import hash_elements, keys, tie_numbers
from evomerge.merge.histogram import BIN_SHIFT, TIES, Band, Histogram
from evomerge.merge.methods.base import MergeInputs, Parameter, Scope, TaskVectorInputs
from evomerge.recipe import Kind

if TYPE_CHECKING:
    from torch import Tensor

TINY_SUM = 1e-8
"""Sum of weights below which `normalize` does not divide, as in mergekit."""
RANKS = 65535
"""Ranks within a row are counted from 0 to this."""


@dataclass(frozen=True, kw_only=True)
class Random:
    """Keep each element with the same chance.

    Attributes:
        last: Largest hash value of an element that is kept; the chance is (last + 1) / 2^32. With -1 nothing
            is kept, and the term's factor must be 0 as well.
    """

    last: int

    @classmethod
    def share(cls, density: float) -> Random:
        """Keep with a chance of `density`, in (0, 1]."""
        return cls(last=round(density * 2**32) - 1)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Keep each element with a chance that grows with the rank of its magnitude within its row.

    Attributes:
        lowest: Chance of the smallest element of a row.
        highest: Chance of its largest element.
        rescale: Divide what is kept by its chance.
    """

    lowest: float
    highest: float
    rescale: bool


Keep = Band | Random | Ranked | None
"""What is kept of a task vector; None keeps everything."""


class Term(NamedTuple):  # as the sum, cheaper to make than a dataclass: a candidate takes thousands
    """One task vector of a sum.

    Attributes:
        source: Position of its model among the inputs.
        weight: Its weight.
        keep: What is kept of it.
        rescale: Factor that makes up for what was dropped.
    """

    source: int
    weight: float
    keep: Keep = None
    rescale: float = 1.0

    @property
    def factor(self) -> float:
        """Factor of the elements that are kept."""
        return float32(self.weight * self.rescale)


class TaskVectorSum(NamedTuple):
    """θ = θ_base + λ Σ_i w_i kept(δ_i), see the attributes.

    Attributes:
        terms: The task vectors, in the recipe's order.
        elect: Add, per element, only terms of the sign of the sum (positive when it is 0).
        normalize: Divide by the sum of the weights; when electing, of the weights of the terms added.
        scale: λ.
    """

    terms: tuple[Term, ...]
    elect: bool
    normalize: bool
    scale: float

    @property
    def ranked(self) -> tuple[int, ...]:
        """Positions of the inputs whose ranks are asked for; see `row_ranks`."""
        return tuple(term.source for term in self.terms if isinstance(term.keep, Ranked))

    @property
    def divisor(self) -> float:
        """What a sum without election is divided by."""
        total = 0.0
        for term in self.terms:
            total = float32(total + float32(term.weight))
        return total if self.normalize and not self.elect and abs(total) >= TINY_SUM else 1.0


def merge_task_vectors(
    operation: Callable[[TaskVectorInputs], TaskVectorSum],
) -> Callable[[MergeInputs], Tensor]:
    """The formula of a method that is stated as a sum of task vectors."""

    def formula(inputs: MergeInputs) -> Tensor:
        # Statistics are those of the whole tensor, which a piece of it does not have.
        deltas = {index: inputs.tensors[index] - inputs.base_tensor for index in inputs.others}
        stated = operation(
            TaskVectorInputs(
                name=inputs.name,
                shape=tuple(inputs.base_tensor.shape),
                others=inputs.others,
                shared=inputs.shared,
                values=inputs.values,
                histogram=lambda source: Histogram.of(deltas[source]),
            )
        )
        ranks = {
            term.source: row_ranks(deltas[term.source])
            for term in stated.terms
            if isinstance(term.keep, Ranked)
        }
        return add_task_vectors(stated, inputs, ranks)

    return formula


def add_task_vectors(stated: TaskVectorSum, inputs: MergeInputs, ranks: Mapping[int, Tensor]) -> Tensor:
    """Carry out a sum of task vectors: float32 of the inputs' shape.

    Args:
        stated: What to add.
        inputs: The tensors, or a run of their elements; parameters are not looked at.
        ranks: Position of a ranked source -> ranks of its elements, see `row_ranks`.
    """
    import torch

    terms = []
    for term in stated.terms:
        delta = inputs.tensors[term.source] - inputs.base_tensor
        terms.append(_scaled(delta, term, inputs, ranks.get(term.source)))
    total = torch.zeros_like(inputs.base_tensor)
    for term_E in terms:
        total.add_(term_E)
    if stated.elect:
        positive = total >= 0
        total = torch.zeros_like(total)
        divisor = torch.zeros_like(total)
        for term_E, term in zip(terms, stated.terms, strict=True):
            # NaN, which has no sign, has its say, so that it is not lost.
            agrees = ~torch.where(positive, term_E <= 0, term_E >= 0)
            total.add_(torch.where(agrees, term_E, 0.0))
            divisor.add_(torch.where(agrees, term.weight, 0.0))
        if stated.normalize:
            total.div_(torch.where(divisor == 0, 1.0, divisor))
    else:
        total.div_(stated.divisor)
    return total.mul_(stated.scale).add_(inputs.base_tensor)


def _scaled(delta: Tensor, term: Term, inputs: MergeInputs, ranks: Tensor | None) -> Tensor:
    """What is kept of a task vector, times its factor."""
    import torch

    keep = term.keep
    if keep is None:
        return delta.mul_(term.factor)
    positions = torch.arange(inputs.first, inputs.first + delta.numel(), device=delta.device)
    k0, k1 = keys(inputs.seed, inputs.name, term.source)
    if isinstance(keep, Band):
        bins = (delta.abs().view(torch.int32) >> BIN_SHIFT).long()
        key = bins * TIES + tie_numbers(positions, k0, k1).view(delta.shape)
        return torch.where((keep.lowest <= key) & (key <= keep.highest), delta * term.factor, 0.0)
    hashes = hash_elements(positions, k0, k1).view(delta.shape)
    dropped = delta * 0  # NaN and infinity do not vanish: they mean that a source is damaged
    if isinstance(keep, Random):
        return torch.where(hashes <= keep.last, delta, dropped).mul_(term.factor)
    assert ranks is not None
    lowest, step = ranked_line(keep)
    chance = ranks.float().mul_(step).add_(lowest)
    uniform = (hashes >> 8).float().mul_(2.0**-24)
    kept = torch.where(uniform < chance, delta / chance if keep.rescale else delta, dropped)
    return kept.mul_(term.factor)


def ranked_line(keep: Ranked) -> tuple[float, float]:
    """Chance of the lowest rank and its growth per rank, both float32 numbers."""
    return float32(keep.lowest), float32((keep.highest - keep.lowest) / RANKS)


def float32(number: float) -> float:
    """The float32 next to a number, infinity when it is too large; NumPy would warn then."""
    return ctypes.c_float(number).value


def row_ranks(delta: Tensor) -> Tensor:
    """Rank of every magnitude within its row (the last dimension), from 0 to `RANKS`; int32 of its shape.

    Elements of equal magnitude are ranked by position. A row of one element has the middle rank.
    """
    import torch

    columns = delta.shape[-1] if delta.ndim else 1
    if columns == 1:
        return torch.full_like(delta, RANKS // 2, dtype=torch.int32)
    order = torch.argsort(delta.abs(), dim=-1, stable=True)
    # Made on the CPU, as not every device has float64.
    line = torch.arange(columns, dtype=torch.float64, device="cpu").mul_(RANKS / (columns - 1)).round_()
    line = line.to(delta.device, torch.int32).expand(delta.shape)
    return torch.empty_like(delta, dtype=torch.int32).scatter_(-1, order, line)


def terms(
    inputs: TaskVectorInputs, keep: Callable[[int], tuple[Keep, float]] = lambda _: (None, 1.0)
) -> tuple[Term, ...]:
    """One term per input other than the base.

    Args:
        inputs: Its weights.
        keep: Position of a source -> what is kept of it, and the factor that makes up for the rest.
    """
    result = []
    for index in inputs.others:
        kept, rescale = keep(index)
        result.append(Term(source=index, weight=inputs.values[index]["weight"], keep=kept, rescale=rescale))
    return tuple(result)


def parameters(
    *,
    normalize: bool,
    density: str | None = None,
    rescale: bool | None = None,
    extra: Sequence[Parameter] = (),
) -> tuple[Parameter, ...]:
    """The parameters of a method on task vectors.

    Args:
        normalize: Default of `normalize`.
        density: What `density` means to the method, or None when it has none.
        rescale: Default of `rescale`, or None when it has none.
        extra: Parameters that only this method has.
    """

    def shared(name: str, default: Any, description: str) -> Parameter:
        kind: Kind = "bool" if isinstance(default, bool) else "float"
        return Parameter(
            name=name,
            kind=kind,
            scope=Scope.RECIPE,
            default=default,
            description=description,
        )

    result = [
        Parameter(
            name="weight",
            kind="float",
            scope=Scope.NON_BASE,
            required=True,
            description="Factor of the model's task vector.",
        ),
    ]
    if density is not None:
        result.append(
            Parameter(
                name="density",
                kind="float",
                scope=Scope.NON_BASE,
                default=1.0,
                low=0.0,
                high=1.0,
                exclude_low=True,
                description=density,
            )
        )
    result += [
        *extra,
        shared("normalize", normalize, "Divide the merged task vector by the sum of the weights."),
        shared("lambda", 1.0, "Factor of the merged task vector."),
        shared("int8_mask", False, "Accepted for mergekit's sake; it saves memory there, changes no result."),
    ]
    if rescale is not None:
        result.append(shared("rescale", rescale, "Make up for what was dropped by scaling up what was kept."))
    return tuple(result)
