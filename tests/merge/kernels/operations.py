"""Operations and inputs that kernels are tried on, and what it means that they agree."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.histogram import Histogram
from evomerge.merge.kernels import reference
from evomerge.merge.kernels.reference import Elements, Operation
from evomerge.merge.methods import Axis, Combination
from evomerge.merge.methods.task_vectors import Keep, Random, Ranked, TaskVectorSum, Term, row_ranks

Run = Callable[[Operation, Elements, Tensor], bool]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def tensors(count: int, *dtypes: torch.dtype, seed: int = 0, change: float = 0.01) -> list[Tensor]:
    """A base and fine-tuned relatives of it, flat, one per type; some elements are equal, 0 or -0."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    found = []
    for number, dtype in enumerate(dtypes):
        tensor = base + (change * torch.randn(count, generator=generator) if number else 0)
        tensor[number::11] = 0.0
        tensor[1::13] = -0.0
        tensor[2::17] = base[2::17]
        found.append(tensor.to(dtype))
    return found


def elements(
    inputs: list[Tensor],
    *,
    base: int | None = 0,
    shape: tuple[int, ...] | None = None,
    first: int = 0,
    seed: int = 3,
    stated: Operation | None = None,
) -> Elements:
    """All elements of the tensors, with ranks where the operation asks for them."""
    ranks = {}
    if isinstance(stated, TaskVectorSum):
        whole = shape or (inputs[0].numel(),)
        for term in stated.terms:
            if isinstance(term.keep, Ranked):
                assert base is not None
                delta = inputs[term.source].float() - inputs[base].float()
                ranks[term.source] = row_ranks(delta.view(whole)).view(-1).to(torch.uint16)
    return Elements(
        name="layers.0.w",
        seed=seed,
        shape=shape or (inputs[0].numel(),),
        first=first,
        tensors=inputs,
        base=base,
        ranks=ranks,
    )


def kept(kind: str, delta: Tensor, draw: random.Random) -> tuple[Keep, float]:
    """What a method of some kind might keep of a task vector, and its rescaling factor."""
    count = delta.numel()
    density = draw.choice([0.999, 0.5, 0.2, 1e-3, 1e-9, draw.random()]) or 0.5
    if kind == "all" or count == 0:
        return None, 1.0
    if kind == "random":
        return Random.share(max(density, 1e-9)), draw.choice([1.0, 1 / density])
    if kind == "ranked":
        density = min(0.9, max(0.1, density))
        return Ranked(lowest=density - 0.09, highest=density + 0.09, rescale=draw.random() < 0.5), 1.0
    number = max(1, int(density * count))
    first = draw.randrange(count - number + 1) if kind == "band" else count - number
    histogram = Histogram.of(delta)
    return histogram.band(first, first + number), draw.choice([1.0, histogram.rescale(first, first + number)])


WEIGHTS = [1.0, 0.7, -0.3, 0.0, 2.5, 1e-9, -1.0]


def task_vector_sum(
    kind: str,
    inputs: list[Tensor],
    *,
    base: int = 0,
    elect: bool,
    normalize: bool,
    draw: random.Random,
    whole: int | None = None,
) -> TaskVectorSum:
    """A random sum of all task vectors of the inputs.

    Args:
        kind: What is kept of a task vector: all, random, ranked, largest or band.
        inputs: The tensors.
        base: Position of the base among them.
        elect: As in `TaskVectorSum`.
        normalize: As there.
        draw: What chooses weights, densities and so on.
        whole: Position of a source that is kept whole, as one of density 1 is, or None.
    """
    terms = []
    for source, tensor in enumerate(inputs):
        if source == base:
            continue
        of = "all" if source == whole else kind
        keep, rescale = kept(of, tensor.float() - inputs[base].float(), draw)
        terms.append(Term(source=source, weight=draw.choice(WEIGHTS), keep=keep, rescale=rescale))
    return TaskVectorSum(
        terms=tuple(terms), elect=elect, normalize=normalize, scale=draw.choice([1.0, 0.4, -1.5, 0.0])
    )


def combination(
    number: int,
    *,
    shape: tuple[int, ...],
    axis: Axis = Axis.WHOLE,
    around: int | None = None,
    seed: int = 0,
    divisor: float = 1.0,
) -> Combination:
    """A combination with random coefficients, that of the base, if any, 0."""
    size = {
        Axis.WHOLE: (),
        Axis.ROWS: (int(np.prod((shape or (1,))[:-1], dtype=int)),),
        Axis.COLUMNS: (int(np.prod(shape[1:], dtype=int)),),
    }[axis]
    c = np.random.default_rng(seed).normal(size=(*size, number))
    if around is not None:
        c[..., around] = 0
    return Combination(coefficients=c, axis=axis, around_base=around is not None, divisor=divisor)


def bits(tensor: Tensor) -> Tensor:
    """The bits of a flat tensor, for comparison; a NaN is a NaN, whatever its bits."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor).view(integer)


def assert_agrees(run: Run, stated: Operation, given: Elements, dtype: torch.dtype) -> Tensor:
    """A kernel gives the reference's bits and its verdict; returns the result."""
    expected = torch.full((given.count,), 7.0, dtype=dtype)
    found = expected.clone()
    before = [tensor.clone() for tensor in given.tensors]
    assert run(stated, given, found) == reference.run(stated, given, expected)
    assert torch.equal(bits(found), bits(expected))
    for tensor, copy in zip(given.tensors, before, strict=True):
        assert torch.equal(bits(tensor), bits(copy)), "an input was changed"
    return found
