"""NuSLERP: along the arc between two models or task vectors, whole or vector by vector."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from .inputs import family, merge, mergekit, mergekit64, rounds_to, weights

SHAPES = [(), (1,), (7,), (17, 31), (3, 5), (2, 3, 5), (5, 1), (1, 5)]


def without_base(*numbers: float) -> list[dict[str, Any]]:
    return [{"weight": number} for number in numbers]


def test_half_way_between_two_axes_is_the_diagonal() -> None:
    merged = merge("nuslerp", [[1.0, 0.0], [0.0, 1.0]], without_base(3, 3))
    torch.testing.assert_close(merged, torch.full((2,), math.sqrt(0.5)))


def test_weights_give_the_place_on_the_arc() -> None:
    merged = merge("nuslerp", [[2.0, 0.0], [0.0, 2.0]], without_base(2, 1))
    torch.testing.assert_close(merged, torch.tensor([math.sqrt(3), 1.0]))


def test_weights_that_sum_to_0_count_alike() -> None:
    tensors = family(5, 5, count=1, change=1.0)
    expected = merge("nuslerp", tensors, without_base(1, 1))
    assert torch.equal(merge("nuslerp", tensors, without_base(1, -1)), expected)


def test_a_base_is_the_origin() -> None:
    base, a, b = family(5, 5, count=2)
    expected = base + merge("nuslerp", [a - base, b - base], without_base(1, 2))
    torch.testing.assert_close(merge("nuslerp", [base, a, b], weights(1, 2), base=0), expected)
    moved = merge("nuslerp", [a, base, b], [{"weight": 1}, {}, {"weight": 2}], base=1)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize(("row_wise", "dim"), [(False, -1), (True, 0)])
def test_unflattened_every_vector_has_its_own_arc(shape: tuple[int, ...], row_wise: bool, dim: int) -> None:
    a, b = family(*shape, count=1, change=1.0)
    merged = merge("nuslerp", [a, b], without_base(1, 2), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    pairs = zip(*(t.movedim(dim, -1).reshape(-1, t.shape[dim]) for t in (merged, a, b)), strict=True)
    for found, x, y in pairs:
        torch.testing.assert_close(found, merge("nuslerp", [x, y], without_base(1, 2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("numbers", [(1, 2), (0.3, 0.7), (1, -1), (0, 1), (-1, 3)])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("change", [1e-3, 0.1, 1.0])
def test_it_is_mergekits(
    shape: tuple[int, ...], numbers: tuple[float, float], flatten: bool, row_wise: bool, change: float
) -> None:
    tensors = family(*shape, count=2, change=change)
    given = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    exact = mergekit64("nuslerp", tensors, weights(*numbers), base=0, **given)
    rounds_to(merge("nuslerp", tensors, weights(*numbers), base=0, **given), exact, *tensors)
    exact = mergekit64("nuslerp", tensors[1:], without_base(*numbers), **given)
    rounds_to(merge("nuslerp", tensors[1:], without_base(*numbers), **given), exact, *tensors)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0.0, 0.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 2.0], [2.0, 4.0]),
        ([3.0], [-2.0]),
        ([1e-9, 0.0], [0.0, 1.0]),
        ([1e-9, 0.0], [2e-9, 1e-9]),
        ([3e-8, 0.0], [-3e-8, 0.0]),
    ],
)
@pytest.mark.parametrize("flatten", [True, False])
def test_zeros_opposites_and_short_vectors_are_handled_as_in_mergekit(
    a: list[float], b: list[float], flatten: bool
) -> None:
    pair = [torch.tensor(a), torch.tensor(b)]
    given = {"values": without_base(1, 2), "nuslerp_flatten": flatten}
    ours, theirs = (run("nuslerp", pair, **given) for run in (merge, mergekit))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [-1.0, -0.3, -7.0, 0.3, 1.0])
def test_opposite_and_parallel_vectors_are_interpolated_linearly_whatever_rounding_does(
    factor: float,
) -> None:
    (a,) = family(1000, count=0)
    merged = merge("nuslerp", [a, a * factor], without_base(1, 1))
    torch.testing.assert_close(merged, a * (1 + factor) / 2)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    a, b = family(3, 4, count=1)
    b[1, 2] = math.inf
    merged = merge("nuslerp", [a, b], without_base(1, 1), nuslerp_flatten=False)
    assert merged.isfinite().all(dim=1).tolist() == [True, False, True]
