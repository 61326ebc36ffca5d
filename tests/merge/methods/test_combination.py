"""Combinations: inner products and sums along every axis, checked against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.merge.methods import Axis, Combination, GramKind, MergeInputs
from evomerge.merge.methods import combination as module
from evomerge.merge.methods.combination import combine, gram_matrices

from .inputs import family

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 5), (5, 1), (0,), (0, 3), (3, 0)]


def inputs(*shape: int, base: int | None = None) -> MergeInputs:
    return MergeInputs(
        name="w", tensors=family(*shape, change=1.0), base=base, shared={}, values=[{}] * 4, seed=0
    )


def as_vectors(array: np.ndarray, axis: Axis) -> list[np.ndarray]:
    """The vectors of an axis, one by one."""
    array = np.atleast_1d(array)
    if axis is Axis.WHOLE:
        return [array.ravel()]
    if axis is Axis.ROWS:
        return [array[place] for place in np.ndindex(array.shape[:-1])]
    return [array[(slice(None), *place)] for place in np.ndindex(array.shape[1:])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("base", [0, 2])
@pytest.mark.parametrize("piece", [1, 4, 1 << 20])
def test_gram_matrices_hold_the_inner_products(
    shape: tuple[int, ...], axis: Axis, base: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    given = inputs(*shape, base=base)
    arrays = [tensor.double().numpy() for tensor in given.tensors]
    deltas = [array - arrays[base] for index, array in enumerate(arrays) if index != base]
    for kind, members in ((GramKind.TENSORS, arrays), (GramKind.TASK_VECTORS, deltas)):
        lists = [as_vectors(member, axis) for member in members]
        expected = [[[x @ y for y in place] for x in place] for place in zip(*lists, strict=True)]
        found = gram_matrices(given, kind, axis)
        assert found.dtype == np.float64
        if axis is Axis.WHOLE:
            assert found.shape == (len(members), len(members))
            found = found[None]
        assert found.shape == (len(lists[0]), len(members), len(members))
        if expected:
            np.testing.assert_allclose(found, np.array(expected), rtol=1e-13, atol=1e-13)


def test_inner_products_of_task_vectors_do_not_cancel() -> None:
    base = torch.full((1000,), 1000.0)
    deltas = torch.linspace(-1, 1, 1000) * 2.0**-13
    given = MergeInputs(name="w", tensors=[base, base + deltas], base=0, shared={}, values=[{}, {}], seed=0)
    exact = float(((base + deltas).double() - base.double()).square().sum())
    assert gram_matrices(given, GramKind.TASK_VECTORS, Axis.WHOLE)[0, 0] == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("base", [None, 0, 2])
@pytest.mark.parametrize("divisor", [1.0, -3.0])
def test_sums_take_the_coefficient_of_their_axis(
    shape: tuple[int, ...], axis: Axis, base: int | None, divisor: float
) -> None:
    given = inputs(*shape, base=base)
    arrays = [tensor.double().numpy() for tensor in given.tensors]
    num_vectors = len(as_vectors(arrays[0], axis))
    c = np.random.default_rng(0).normal(size=(num_vectors, 4))
    anchor = np.zeros(shape) if base is None else arrays[base]
    expected = np.array(anchor)
    for place, row in enumerate(c):
        target = as_vectors(np.atleast_1d(expected) if shape else expected.reshape(1), axis)[place]
        for index, array in enumerate(arrays):
            if index != base:
                delta = as_vectors(array, axis)[place] - as_vectors(anchor, axis)[place]
                target += row[index] * delta / divisor  # a view of `expected`
    coefficients = c[0] if axis is Axis.WHOLE else c
    stated = Combination(coefficients=coefficients, axis=axis, around_base=base is not None, divisor=divisor)
    merged = combine(given, stated)
    assert merged.shape == given.tensors[0].shape
    assert merged.is_contiguous()
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_coefficient_of_1_passes_every_bit() -> None:
    tensor = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf")])
    given = MergeInputs(name="w", tensors=[tensor], base=None, shared={}, values=[{}], seed=0)
    merged = combine(given, Combination(coefficients=np.ones(1)))
    assert torch.equal(merged.view(torch.int32), tensor.view(torch.int32))
