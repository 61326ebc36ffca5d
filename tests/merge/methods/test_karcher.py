"""Karcher mean: the centre on the sphere."""

from __future__ import annotations

import math

import pytest
import torch

from .inputs import family, merge, mergekit, mergekit64, rounds_to

SHAPES = [(), (1,), (7,), (17, 31), (2, 3, 5), (1000,)]


def test_the_mean_of_the_axes_is_the_diagonal_at_their_mean_size() -> None:
    merged = merge("karcher", [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(merged, torch.full((3,), 2 / math.sqrt(3)))


def test_the_mean_of_two_is_half_way_on_the_arc() -> None:
    a, b = family(50, count=1, change=1.0)
    a, b = a / a.norm(), b / b.norm()
    torch.testing.assert_close(merge("karcher", [a, b]), merge("slerp", [a, b], base=0, t=0.5))


def test_the_pulls_of_all_models_cancel_there() -> None:
    tensors = [tensor.double() for tensor in family(50, count=4, change=3.0)]
    mean = merge("karcher", tensors, max_iter=100, tol=1e-9).double()
    mean /= mean.norm()
    pull = torch.zeros(50, dtype=torch.float64)
    for tensor in tensors:
        unit = tensor / tensor.norm()
        across = unit - (unit @ mean) * mean
        pull += torch.arccos(unit @ mean) * across / across.norm()
    assert float(pull.norm()) < 1e-6


def test_the_base_counts_as_one_of_the_models() -> None:
    tensors = family(5, 5)
    assert torch.equal(merge("karcher", tensors, base=0), merge("karcher", tensors))
    one = merge("karcher", tensors[1:])
    assert not torch.allclose(merge("karcher", tensors, base=0), one)


def test_a_single_model_stays_as_it_is() -> None:
    (tensor,) = family(5, 5, count=0)
    assert torch.equal(merge("karcher", [tensor]), tensor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("max_iter", [0, 1, 10])
@pytest.mark.parametrize("change", [1e-3, 0.1, 1.0, 10.0])
def test_it_is_mergekits(shape: tuple[int, ...], count: int, max_iter: int, change: float) -> None:
    tensors = family(*shape, count=count, change=change)
    exact = mergekit64("karcher", tensors, max_iter=max_iter)
    rounds_to(merge("karcher", tensors, max_iter=max_iter), exact, *tensors)


@pytest.mark.parametrize("tol", [1e-3, 0.1, 1.0])
def test_it_stops_where_mergekit_does(tol: float) -> None:
    tensors = family(50, count=4, change=3.0)
    rounds_to(merge("karcher", tensors, tol=tol), mergekit64("karcher", tensors, tol=tol), *tensors)


@pytest.mark.parametrize("tol", [1e-5, 0.5])
def test_models_closer_than_the_tolerance_do_not_pull(tol: float) -> None:
    tensors = [torch.tensor([math.cos(arc), math.sin(arc)]) for arc in (0.0, 0.1, 3.0)]
    rounds_to(merge("karcher", tensors, tol=tol), mergekit64("karcher", tensors, tol=tol), *tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        ([0.0, 0.0], [1.0, 2.0]),
        ([0.0], [0.0]),
        ([0.0, 0.0], [1.0, 2.0], [3.0, -1.0]),
        ([1e-6, 0.0], [0.0, 1.0]),
        ([1.0, 2.0], [-1.0, -2.0]),
        ([1.0, 2.0], [1.0, 2.0], [-1.0, -2.0]),
        ([3.0], [-2.0]),
        ([3.0], [-2.0], [4.0]),
    ],
)
def test_zeros_and_opposites_are_handled_as_in_mergekit(tensors: tuple[list[float], ...]) -> None:
    given = [torch.tensor(values) for values in tensors]
    torch.testing.assert_close(merge("karcher", given), mergekit("karcher", given))


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7, 1.1, 1.3])
@pytest.mark.parametrize("size", [3, 30, 1000])
def test_what_is_opposite_but_for_rounding_pulls_nowhere(factor: float, size: int) -> None:
    (a,) = family(size, count=0)
    torch.testing.assert_close(merge("karcher", [a, a * -factor]), a * (1 + factor) / 2)
    torch.testing.assert_close(merge("karcher", [a, a * 0.9, a * -factor]), a * (1.9 + factor) / 3)


def test_a_tolerance_of_0_is_no_division_by_0() -> None:
    a, b = family(50, count=1)
    torch.testing.assert_close(merge("karcher", [a, a.clone()], tol=0.0), a)
    torch.testing.assert_close(merge("karcher", [a, -0.3 * a], tol=0.0), 0.65 * a)
    assert merge("karcher", [a, b, torch.zeros(50), -a], tol=0.0).isfinite().all()
