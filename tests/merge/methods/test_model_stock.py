"""Model Stock: between the base and the average, by the angles."""

from __future__ import annotations

import math

import pytest
import torch

from .inputs import family, merge, mergekit, mergekit64, rounds_to

BASE = torch.tensor([1.0, 1.0])


def at(degrees: float, length: float = 1.0) -> torch.Tensor:
    radians = math.radians(degrees)
    return BASE + length * torch.tensor([math.cos(radians), math.sin(radians)])


def test_models_that_agree_are_averaged_and_unrelated_ones_leave_the_base() -> None:
    torch.testing.assert_close(merge("model_stock", [BASE, at(30), at(30, 3)], base=0), at(30, 2))
    torch.testing.assert_close(merge("model_stock", [BASE, at(0), at(90)], base=0), BASE)


def test_the_ratio_follows_from_the_angle() -> None:
    # t = 2 cos 60° / (1 + cos 60°) = 2/3
    expected = BASE + 2 / 3 * ((at(0) + at(60)) / 2 - BASE)
    torch.testing.assert_close(merge("model_stock", [BASE, at(0), at(60)], base=0), expected)
    # The mean of the cosines of 60°, 60° and 120° is 1/6: t = 3/6 / (1 + 2/6) = 3/8.
    expected = BASE + 3 / 8 * ((at(0) + at(60) + at(120)) / 3 - BASE)
    torch.testing.assert_close(merge("model_stock", [BASE, at(0), at(60), at(120)], base=0), expected)


def test_the_ratio_is_not_limited() -> None:
    # t = 2 cos 120° / (1 + cos 120°) = -2
    expected = BASE - 2 * ((at(0) + at(120)) / 2 - BASE)
    torch.testing.assert_close(merge("model_stock", [BASE, at(0), at(120)], base=0), expected)


@pytest.mark.parametrize("length", [1.0, 0.3])
def test_opposite_models_leave_the_base(length: float) -> None:
    assert torch.equal(merge("model_stock", [BASE, at(45), at(225, length)], base=0), BASE)


@pytest.mark.parametrize("length", [0.0, 1e-5])
def test_models_that_hardly_changed_are_handled_as_in_mergekit(length: float) -> None:
    tensors = [torch.zeros(2), length * (at(0) - BASE), length * (at(30) - BASE)]
    exact = mergekit("model_stock", tensors, base=0)
    torch.testing.assert_close(merge("model_stock", tensors, base=0), exact, rtol=1e-5, atol=0)


def test_row_by_row_every_row_has_its_own_ratio() -> None:
    rows = [[BASE, BASE], [at(0), at(0)], [at(60), at(0)]]
    merged = merge("model_stock", [torch.stack(row) for row in rows], base=0, filter_wise=True)
    torch.testing.assert_close(merged[0], merge("model_stock", [BASE, at(0), at(60)], base=0))
    torch.testing.assert_close(merged[1], at(0))


@pytest.mark.parametrize("shape", [(7,), (17, 31), (6, 40), (2, 3, 50), (1000,)])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("filter_wise", [True, False])
@pytest.mark.parametrize("change", [1e-3, 1.0])
def test_it_is_mergekits(shape: tuple[int, ...], count: int, filter_wise: bool, change: float) -> None:
    base, *noise = family(*shape, count=count, change=change)
    # A shared change keeps the cosines away from the pole at -1 / (N - 1).
    tensors = [base, *(tensor + change * base.sin() for tensor in noise)]
    exact = mergekit64("model_stock", tensors, base=0, filter_wise=filter_wise)
    rounds_to(merge("model_stock", tensors, base=0, filter_wise=filter_wise), exact, *tensors)


@pytest.mark.parametrize("filter_wise", [True, False])
def test_a_scalar_is_a_tensor_of_one_element(filter_wise: bool) -> None:
    tensors = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)]
    assert float(merge("model_stock", tensors, base=0, filter_wise=filter_wise)) == pytest.approx(3.0)


@pytest.mark.parametrize("base", [0, 1, 2])
def test_the_base_may_stand_anywhere(base: int) -> None:
    tensors = [at(0), at(60)]
    tensors.insert(base, BASE)
    expected = merge("model_stock", [BASE, at(0), at(60)], base=0)
    torch.testing.assert_close(merge("model_stock", tensors, base=base), expected)
