"""Multi-SLERP: mean direction and mean size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomerge.errors import EvomergeError

from .inputs import family, merge, mergekit, mergekit64, rounds_to, weights

AXES = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]


def without_base(*numbers: float) -> list[dict[str, Any]]:
    return [{"weight": number} for number in numbers]


def test_it_points_along_the_mean_of_the_directions_and_is_as_long_as_the_mean() -> None:
    merged = merge("multislerp", [[4.0, 0.0], [0.0, 2.0]], without_base(1, 1))
    torch.testing.assert_close(merged, torch.tensor([3.0, 3.0]) * 0.5**0.5)
    merged = merge("multislerp", AXES, without_base(1, 2, 2))
    torch.testing.assert_close(merged, torch.tensor([1.0, 2.0, 2.0]) * 2 / 3)


def test_without_normalisation_weights_scale_the_result() -> None:
    merged = merge("multislerp", AXES, without_base(1, 2, 2), normalize_weights=False)
    torch.testing.assert_close(merged, torch.tensor([1.0, 2.0, 2.0]) * 10 / 3)


def test_a_base_is_the_origin() -> None:
    base, *others = family(5, 5)
    expected = base + merge("multislerp", [other - base for other in others], without_base(1, 2, 3))
    torch.testing.assert_close(merge("multislerp", [base, *others], weights(1, 2, 3), base=0), expected)


def test_a_single_model_stays_as_it_is_with_or_without_a_base() -> None:
    base, one = family(5, 5, count=1)
    assert torch.equal(merge("multislerp", [one], without_base(0.3)), one)
    assert torch.equal(merge("multislerp", [base, one], weights(0.3), base=0), one)
    assert torch.equal(merge("multislerp", [one, base], [{"weight": 0.3}, {}], base=1), one)


@pytest.mark.parametrize("shape", [(7,), (17, 31), (2, 3, 5), (1000,)])
@pytest.mark.parametrize("numbers", [(1, 2, 3), (0.3, 0.7, 0), (1, -0.5, 0.2), (0, 1, 0), (1, 1)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 0.01])
@pytest.mark.parametrize("change", [1e-3, 1.0])
def test_it_is_mergekits(
    shape: tuple[int, ...], numbers: tuple[float, ...], normalize: bool, eps: float, change: float
) -> None:
    tensors = family(*shape, count=len(numbers), change=change)
    given = {"normalize_weights": normalize, "eps": eps}
    exact = mergekit64("multislerp", tensors, weights(*numbers), base=0, **given)
    size = [tensor * sum(numbers) for tensor in tensors]
    rounds_to(merge("multislerp", tensors, weights(*numbers), base=0, **given), exact, *tensors, *size)
    exact = mergekit64("multislerp", tensors[1:], without_base(*numbers), **given)
    rounds_to(merge("multislerp", tensors[1:], without_base(*numbers), **given), exact, *tensors, *size)


@pytest.mark.parametrize("scale", [-1.0, -0.3])
@pytest.mark.parametrize("normalize", [True, False])
def test_two_opposite_models_are_added_by_weight(scale: float, normalize: bool) -> None:
    (a,) = family(100, count=0)
    merged = merge("multislerp", [a, scale * a], without_base(2, 2), normalize_weights=normalize)
    torch.testing.assert_close(merged, (1 + scale) * a * (0.5 if normalize else 2), atol=1e-6, rtol=1e-6)
    pair = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])]
    given = {"values": without_base(1, 1), "normalize_weights": normalize}
    assert torch.equal(merge("multislerp", pair, **given), mergekit("multislerp", pair, **given))


@pytest.mark.parametrize("scale", [-1.0, -0.3])
def test_several_models_that_balance_out_are_an_error_that_names_the_tensor(scale: float) -> None:
    (a,) = family(100, count=0)
    tensors = [a, a, scale * a]
    if scale == -1:
        with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
            mergekit("multislerp", tensors, without_base(0.25, 0.25, 0.5))
    with pytest.raises(EvomergeError, match=r"model\.norm: multislerp: .*no direction; change the weights"):
        merge("multislerp", tensors, without_base(1, 1, 2), name="model.norm")


def test_weights_to_be_normalised_must_not_sum_to_0() -> None:
    with pytest.raises(EvomergeError, match=r"^w: multislerp: the weights sum to 0"):
        merge("multislerp", AXES, without_base(1, 1, -2))
    assert merge("multislerp", AXES, without_base(1, 1, -2), normalize_weights=False).tolist() == [0, 0, 0]


def test_models_equal_to_the_base_change_nothing() -> None:
    (base,) = family(5, 5, count=0)
    merged = merge("multislerp", [base, base.clone(), base.clone(), base.clone()], weights(1, 2, 3), base=0)
    assert torch.equal(merged, base)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_model_of_zeros_has_no_direction_but_counts_in_the_size(eps: float) -> None:
    merged = merge("multislerp", [[0.0, 0.0], [0.0, 2.0], [0.0, 4.0]], without_base(1, 1, 2), eps=eps)
    torch.testing.assert_close(merged, torch.tensor([0.0, 2.5]))
