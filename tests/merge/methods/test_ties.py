"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.merge.methods.ties import trim

from .inputs import close, family, merge, mergekit, weights


def trimmed(delta: torch.Tensor, density: float, seed: int = 0) -> torch.Tensor:
    return trim(delta.clone(), density, seed=seed, tensor_name="w", source=1)


def coarse(count: int = 50_000, seed: int = 0) -> torch.Tensor:
    """The difference of two bfloat16 tensors: few distinct magnitudes, many of them 0."""
    base, other = family(count, count=1, seed=seed, change=0.005)
    return other.bfloat16().float() - base.bfloat16().float()


def test_the_elected_sign_wins_element_by_element() -> None:
    base = [0.0, 0.0, 0.0, 0.0]
    one, two = [3.0, -1.0, 2.0, 0.0], [-1.0, -2.0, -2.0, 4.0]
    # Sums 2, -3, 0 (counted as positive), 4: elected +, -, +, +; the mean is over those that agree.
    merged = merge("ties", [base, one, two], weights(1.0, 1.0), base=0)
    assert merged.tolist() == [3.0, -1.5, 2.0, 4.0]
    merged = merge("ties", [base, one, two], weights(1.0, 1.0), base=0, normalize=False)
    assert merged.tolist() == [3.0, -3.0, 2.0, 4.0]


def test_a_negative_weight_turns_the_sign_that_is_elected() -> None:
    # Weighted -3 and -1 agree on minus; their weights -1 and 1 cancel, so nothing is divided.
    assert merge("ties", [[0.0], [3.0], [-1.0]], weights(-1.0, 1.0), base=0).tolist() == [-4.0]


def test_only_the_largest_elements_stay() -> None:
    delta = torch.tensor([[0.1, -5.0, 3.0], [-2.0, 4.0, 1.0]])
    assert trimmed(delta, 0.5).tolist() == [[0.0, -5.0, 3.0], [0.0, 4.0, 0.0]]


def test_lambda_and_rescaling() -> None:
    base, one = torch.zeros(4), torch.tensor([4.0, -3.0, 2.0, 1.0])
    merged = merge("ties", [base, one], weights(1.0, density=0.5), base=0, rescale=True)
    torch.testing.assert_close(merged, torch.tensor([4.0, -3.0, 0, 0]) * 10 / 7)
    merged = merge("ties", [base, one], weights(1.0, density=0.5), base=0, **{"lambda": 2.0})
    assert merged.tolist() == [8.0, -6.0, 0.0, 0.0]


@pytest.mark.parametrize("density", [1.0, 0.999, 0.5, 0.29, 0.1, 1e-6])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_continuous_task_vectors_are_trimmed_as_by_mergekit(density: float, count: int) -> None:
    from mergekit.sparsify import magnitude

    delta = family(count, seed=count)[0]
    assert torch.equal(trimmed(delta, density), magnitude(delta, density))
    assert int((trimmed(delta, density) != 0).sum()) == max(1, int(density * count))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
def test_it_is_mergekits_on_continuous_weights(density: float, rescale: bool) -> None:
    given = {"tensors": family(31, 17), "values": weights(0.5, 0.9, -0.2, density=density), "base": 0}
    close(merge("ties", **given, rescale=rescale), mergekit("ties", **given, rescale=rescale))


@pytest.mark.parametrize("density", [0.6, 0.5, 0.2, 0.03])
def test_of_equal_magnitudes_at_the_threshold_as_many_stay_as_the_density_asks(density: float) -> None:
    delta = coarse()
    count = delta.numel()
    kept = trimmed(delta, density) != 0
    magnitude = delta.abs()
    cut = magnitude.sort(descending=True).values[int(density * count) - 1]
    assert cut > 0
    assert kept[magnitude > cut].all()
    assert not kept[magnitude < cut].any()
    at_cut = int((magnitude == cut).sum())
    assert at_cut > 20, "the test needs many ties"
    share = (int(density * count) - int((magnitude > cut).sum())) / at_cut
    deviation = math.sqrt(at_cut * share * (1 - share)) + 1
    assert abs(int(kept.sum()) - int(density * count)) < 4 * deviation
    # Chosen by the hash, not by position: every part of the tensor keeps its share.
    halves = [int(half.sum()) for half in (kept & (magnitude == cut)).chunk(2)]
    assert abs(halves[0] - halves[1]) < 6 * deviation


def test_the_choice_among_ties_is_the_same_every_time_and_another_for_another_seed() -> None:
    delta = coarse()
    assert torch.equal(trimmed(delta, 0.5), trimmed(delta, 0.5))
    assert not torch.equal(trimmed(delta, 0.5), trimmed(delta, 0.5, seed=1))


def test_a_density_beyond_the_share_of_changed_elements_keeps_them_all() -> None:
    delta = coarse()
    density = float((delta != 0).float().mean()) + 0.05
    assert torch.equal(trimmed(delta, density), delta)


@pytest.mark.parametrize("density", [1e-9, 0.5, 0.99])
def test_zeros_stay_zeros(density: float) -> None:
    assert torch.equal(trimmed(torch.zeros(3, 3), density), torch.zeros(3, 3))
    assert trimmed(torch.zeros(0, 3), density).shape == (0, 3)


def test_more_nan_than_may_stay_is_no_crash() -> None:
    delta = torch.full((10,), math.nan)
    assert trimmed(delta, 0.1).isnan().all()
