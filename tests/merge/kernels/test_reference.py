"""The reference carries out operations as their definitions read, here in NumPy's float64."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evomerge.merge.counter_hash import hash_element, keys, tie_number
from evomerge.merge.histogram import Band
from evomerge.merge.kernels import reference
from evomerge.merge.kernels.reference import Elements
from evomerge.merge.methods import Axis
from evomerge.merge.methods.task_vectors import RANKS, Random, Ranked, TaskVectorSum, Term

from .operations import BF16, F16, F32, F64, bits, combination, elements, task_vector_sum, tensors

COUNT = 91


def expected_sum(stated: TaskVectorSum, given: Elements) -> NDArray[np.float64]:
    """θ_base + λ Σ_i w_i kept(δ_i), element by element."""
    assert given.base is not None
    arrays = [tensor.double().numpy() for tensor in given.tensors]
    merged = arrays[given.base].copy()
    for e in range(given.count):
        terms = []
        for term in stated.terms:
            delta = float(given.tensors[term.source][e].float() - given.tensors[given.base][e].float())
            both_keys = keys(given.seed, given.name, term.source)
            h, tie = hash_element(given.first + e, *both_keys), tie_number(given.first + e, *both_keys)
            rank = int(given.ranks[term.source][e]) if term.source in given.ranks else 0
            terms.append((term.weight, term.weight * term.rescale * kept(delta, term.keep, h, tie, rank)))
        total = sum(value for _, value in terms)
        divisor = sum(weight for weight, _ in terms) if stated.normalize else 1.0
        if stated.elect:
            sign = 1 if total >= 0 else -1
            total = sum(value for _, value in terms if value * sign > 0)
            divisor = sum(weight for weight, value in terms if value * sign > 0) if stated.normalize else 1.0
        merged[e] += stated.scale * total / (divisor if abs(divisor) > 1e-8 else 1.0)
    return merged


def kept(delta: float, keep: Any, h: int, tie: int, rank: int) -> float:
    if isinstance(keep, Random):
        return delta if h <= keep.last else 0.0
    if isinstance(keep, Ranked):
        chance = keep.lowest + (keep.highest - keep.lowest) * rank / RANKS
        return (delta / chance if keep.rescale else delta) if h / 2**32 < chance else 0.0
    if isinstance(keep, Band):
        key = (int(np.abs(np.float32(delta)).view(np.uint32)) >> 14) * 2**15 + tie
        return delta if keep.lowest <= key <= keep.highest else 0.0
    return delta


@pytest.mark.parametrize("kind", ["all", "random", "largest", "band", "ranked"])
@pytest.mark.parametrize(("elect", "normalize"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("base", [0, 2])
@pytest.mark.parametrize("first", [0, 2**32 - 40])
def test_sums_of_task_vectors(kind: str, elect: bool, normalize: bool, base: int, first: int) -> None:
    for number in range(4):
        inputs = tensors(COUNT, F32, F32, F32, F32, seed=number, change=1.0)
        stated = task_vector_sum(
            kind, inputs, base=base, elect=elect, normalize=normalize, draw=random.Random(number)
        )
        given = elements(inputs, base=base, first=first, stated=stated)
        out = torch.empty(COUNT, dtype=F32)
        assert reference.run(stated, given, out)
        weights = sum(abs(term.weight * term.rescale) for term in stated.terms)
        # Where the divisor is small, rounding of the sum is blown up as well.
        size = 10 * max(1, weights) * abs(stated.scale) / min(1, abs(stated.divisor)) + 1
        np.testing.assert_allclose(
            out.double().numpy(), expected_sum(stated, given), rtol=1e-5, atol=1e-6 * size
        )


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (3, 4, 5), (1, 8), (8, 1), (0, 3)])
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("around", [None, 1])
def test_combinations(shape: tuple[int, ...], axis: Axis, around: int | None) -> None:
    inputs = tensors(math.prod(shape), F32, F32, F32)
    stated = combination(3, shape=shape, axis=axis, around=around, divisor=-0.7)
    c = stated.coefficients
    if axis is not Axis.WHOLE:
        rows = int(np.prod((shape or (1,))[:-1], dtype=int))
        # A coefficient per row stands for all of the row's elements, one per column for all of the column's.
        c = c.reshape(rows, 1, 3) if axis is Axis.ROWS else c.reshape(1, -1, 3)
        whole = (rows, -1) if axis is Axis.ROWS else ((shape or (1,))[0], -1)
        if 0 in shape:
            whole = (0, 3) if axis is Axis.ROWS else (0, math.prod(shape[1:]))
        arrays = [tensor.double().numpy().reshape(whole) for tensor in inputs]
    else:
        arrays = [tensor.double().numpy() for tensor in inputs]
    origin = 0.0 if around is None else arrays[around]
    total = sum(c[..., i] * (arrays[i] - origin) for i in range(3)) / -0.7 + origin
    out = torch.empty(math.prod(shape))
    assert reference.run(stated, elements(inputs, base=around, shape=shape), out)
    np.testing.assert_allclose(out.double().numpy(), np.ravel(total), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_sources_stay_as_they_are(dtype: torch.dtype) -> None:
    inputs = tensors(COUNT, dtype, dtype, dtype)
    before = [tensor.clone() for tensor in inputs]
    for axis, around in itertools.product(Axis, [None, 0]):
        stated = combination(3, shape=(7, 13), axis=axis, around=around)
        reference.run(stated, elements(inputs, base=around, shape=(7, 13)), torch.empty(COUNT, dtype=dtype))
    for kind in ("all", "random", "band", "ranked"):
        summed = task_vector_sum(kind, inputs, elect=True, normalize=True, draw=random.Random(0))
        reference.run(summed, elements(inputs, stated=summed), torch.empty(COUNT, dtype=dtype))
    for tensor, copy in zip(inputs, before, strict=True):
        assert bits(tensor).equal(bits(copy))


def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(COUNT, BF16, BF16, BF16)
    for kind in ("random", "band", "ranked"):
        stated = task_vector_sum(kind, inputs, elect=True, normalize=True, draw=random.Random(2))
        whole = elements(inputs, first=2**32 - 9, stated=stated)
        expected, found = torch.empty(COUNT), torch.empty(COUNT)
        assert reference.run(stated, whole, expected)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "PIECE", 10)
            assert reference.run(stated, whole, found)
        assert bits(found).equal(bits(expected))


@pytest.mark.parametrize("place", [0, 45, COUNT - 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 65520.0])
def test_what_is_not_finite_is_reported(place: int, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PIECE", 10)
    inputs = tensors(COUNT, F32, F32)
    stated = TaskVectorSum(terms=(Term(source=1, weight=1.0),), elect=False, normalize=False, scale=1.0)
    out = torch.empty(COUNT, dtype=F16)
    assert reference.run(stated, elements(inputs), out)
    inputs[0][place], inputs[1][place] = 0.0, bad
    assert not reference.run(stated, elements(inputs), out)


def test_parts_of_runs_know_their_place() -> None:
    inputs = tensors(COUNT, F32, F32)
    ranks = torch.arange(COUNT).to(torch.uint16)
    whole = Elements(name="w", seed=1, shape=(COUNT,), first=5, tensors=inputs, base=0, ranks={1: ranks})
    part = whole.part(10, 30).part(2, 7)
    assert (part.first, part.count, part.name, part.seed, part.base) == (17, 5, "w", 1, 0)
    assert part.shape == (COUNT,)
    assert part.tensors[1].equal(inputs[1][12:17])
    assert part.ranks[1].tolist() == [12, 13, 14, 15, 16]
