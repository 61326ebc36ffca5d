"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from .inputs import close, family, merge, mergekit, rounds_to, weights
from .trimming import assert_trimmed_alike, at_ends, bins, coarse


def trimmed(delta: torch.Tensor, density: float, seed: int = 0) -> torch.Tensor:
    """What is left of a task vector: of a single one no element is outvoted."""
    base = torch.zeros_like(delta)
    return merge("ties", [base, delta], weights(1.0, density=density), base=0, seed=seed, normalize=False)


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
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001, 1 << 20])
def test_continuous_task_vectors_are_trimmed_as_by_mergekit(density: float, count: int) -> None:
    from mergekit.sparsify import magnitude

    delta = family(count, seed=count)[0]
    kept = max(1, int(density * count))
    assert_trimmed_alike(trimmed(delta, density), magnitude(delta, density), delta, count - kept, count)


@pytest.mark.parametrize("density", [0.9, 0.6, 0.5, 0.2, 0.03])
def test_coarse_task_vectors_are_trimmed_as_by_mergekit(density: float) -> None:
    from mergekit.sparsify import magnitude

    delta = coarse(1 << 20)
    first = delta.numel() - int(density * delta.numel())
    assert_trimmed_alike(trimmed(delta, density), magnitude(delta, density), delta, first, delta.numel())


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
def test_it_is_mergekits_on_continuous_weights(density: float, rescale: bool) -> None:
    given = {"tensors": family(31, 17), "values": weights(0.5, 0.9, -0.2, density=density), "base": 0}
    base, *others = given["tensors"]
    first = 31 * 17 - int(density * 31 * 17)
    clear = ~sum((at_ends(tensor - base, first, 31 * 17) for tensor in others), torch.tensor(False))
    assert int((~clear).sum()) < 20
    ours, theirs = merge("ties", **given, rescale=rescale), mergekit("ties", **given, rescale=rescale)
    if rescale:
        # The norm of what is kept is known up to the bin at the threshold.
        torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-5, atol=1e-5)
    else:
        close(ours[clear], theirs[clear])


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
def test_rescaling_restores_the_norm(density: float) -> None:
    for delta in (family(1 << 16)[0], coarse(1 << 16)):
        base = torch.zeros_like(delta)
        merged = merge("ties", [base, delta], weights(1.0, density=density), base=0, rescale=True)
        assert float(merged.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=0.02)


@pytest.mark.parametrize("density", [0.6, 0.5, 0.2, 0.03])
def test_of_equal_magnitudes_at_the_threshold_as_many_stay_as_the_density_asks(density: float) -> None:
    delta = coarse()
    count = delta.numel()
    kept = trimmed(delta, density) != 0
    magnitude = delta.abs()
    cut = magnitude.sort(descending=True).values[int(density * count) - 1]
    assert cut > 0
    assert kept[magnitude > cut * 1.002].all()
    assert not kept[magnitude < cut * 0.998].any()
    at_cut = int((bins(delta) == bins(cut)).sum())
    assert at_cut > 20, "the test needs many ties"
    share = (int(density * count) - int((bins(delta) > bins(cut)).sum())) / at_cut
    deviation = math.sqrt(at_cut * share * (1 - share)) + 1
    assert abs(int(kept.sum()) - int(density * count)) < 4 * deviation
    # Chosen by the hash, not by position: every part of the tensor keeps its share.
    halves = [int(half.sum()) for half in (kept & (bins(delta) == bins(cut))).chunk(2)]
    assert abs(halves[0] - halves[1]) < 6 * deviation


def test_the_choice_among_ties_is_the_same_every_time_and_another_for_another_seed() -> None:
    delta = coarse()
    assert torch.equal(trimmed(delta, 0.5), trimmed(delta, 0.5))
    assert not torch.equal(trimmed(delta, 0.5), trimmed(delta, 0.5, seed=1))


def test_two_sources_with_the_same_task_vector_are_trimmed_by_hashes_of_their_own() -> None:
    delta = torch.ones(10_000)
    merged = merge(
        "ties", [torch.zeros(10_000), delta, delta], weights(1.0, 2.0, density=0.5), base=0, normalize=False
    )
    counts = torch.bincount(merged.long(), minlength=4)
    assert counts.sub(2500).abs().max() < 4 * math.sqrt(2500 * 0.75)


def test_what_is_kept_grows_with_the_density() -> None:
    delta = coarse()
    masks = [trimmed(delta, density) != 0 for density in (0.05, 0.3, 0.31, 0.6, 0.9)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


def test_a_density_beyond_the_share_of_changed_elements_keeps_them_all() -> None:
    delta = coarse()
    density = float((delta != 0).float().mean()) + 0.05
    assert torch.equal(trimmed(delta, density), delta)


@pytest.mark.parametrize("density", [1e-9, 0.5, 0.99])
def test_zeros_stay_zeros(density: float) -> None:
    assert torch.equal(trimmed(torch.zeros(3, 3), density), torch.zeros(3, 3))
    assert trimmed(torch.zeros(0, 3), density).shape == (0, 3)


def test_a_scalar_is_kept() -> None:
    assert trimmed(torch.tensor(-2.5), 0.01).item() == -2.5


def test_it_is_the_mean_of_float64_of_what_agrees() -> None:
    base, one, two, three = family(4096, count=3, change=1.0)
    numbers = torch.tensor([0.5, 0.9, 0.2], dtype=torch.float64).view(3, 1)
    deltas = torch.stack([tensor - base for tensor in (one, two, three)]).double() * numbers
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    # Where the sum is nearly 0, rounding may elect the other sign.
    clear = deltas.sum(0).abs() > 1e-5
    exact = base.double() + (deltas * agrees).sum(0) / (numbers * agrees).sum(0)
    merged = merge("ties", [base, one, two, three], weights(0.5, 0.9, 0.2), base=0)
    rounds_to(merged[clear], exact[clear], base, one, two, three)
    assert clear.double().mean() > 0.99


def test_more_nan_than_may_stay_is_no_crash() -> None:
    delta = torch.full((10,), math.nan)
    merge("ties", [torch.zeros(10), delta], weights(1.0, density=0.1), base=0, rescale=True)
    merge("ties", [torch.zeros(10), delta / 0 * math.inf], weights(1.0, density=0.1), base=0, rescale=True)
