"""DARE: random elements of the task vectors are dropped, the rest rescaled."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.merge.counter_hash import keep_mask

from .inputs import family, merge, mergekit, weights

SIZE = 1 << 16


def test_kept_elements_are_divided_by_the_density() -> None:
    base, one, two = family(SIZE, count=2)
    values = [{}, {"weight": 0.5, "density": 0.25}, {"weight": 2.0, "density": 0.5}]
    merged = merge("dare_linear", [base, one, two], values, base=0, seed=3, name="x", **{"lambda": 1.5})
    first, second = (
        keep_mask(SIZE, density, seed=3, tensor_name="x", source=source)
        for source, density in ((1, 0.25), (2, 0.5))
    )
    expected = base + 1.5 * (0.5 * first * (one - base) / 0.25 + 2.0 * second * (two - base) / 0.5)
    torch.testing.assert_close(merged, expected)


def test_without_rescaling_they_stay_as_they_are() -> None:
    merged = merge(
        "dare_linear",
        [torch.zeros(SIZE), torch.ones(SIZE)],
        weights(1.0, density=0.25),
        base=0,
        rescale=False,
    )
    assert set(merged.tolist()) == {0.0, 1.0}


def test_what_is_kept_grows_with_the_density() -> None:
    ones = [torch.zeros(SIZE), torch.ones(SIZE)]
    masks = [merge("dare_linear", ones, weights(1.0, density=p), base=0) != 0 for p in (0.01, 0.3, 0.8)]
    assert not (masks[0] & ~masks[1]).any()
    assert not (masks[1] & ~masks[2]).any()


def test_a_density_below_the_hash_keeps_nothing_rather_than_infinity() -> None:
    tensors = family(50, count=1)
    assert torch.equal(merge("dare_linear", tensors, weights(1.0, density=1e-12), base=0), tensors[0])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_it_has_mergekits_distribution(density: float) -> None:
    """Both keep the same share; their means agree within sampling error, and so do their variances.

    mergekit rescales by the ratio of L1 norms, ours by 1/density: these differ by sampling noise.
    """
    tensors = family(SIZE, count=1)
    values = weights(1.0, density=density)
    torch.manual_seed(1234)  # not that of `family`, whose numbers it would repeat
    deltas = [run("dare_linear", tensors, values, base=0) - tensors[0] for run in (merge, mergekit)]
    shares = [float((delta.abs() > 1e-6).float().mean()) for delta in deltas]
    deviation = math.sqrt(density * (1 - density) / SIZE)
    for share in shares:
        assert abs(share - density) < 4 * deviation + 1e-4
    # Rescaled to the same L1 norm as the whole task vector.
    whole = float((tensors[1] - tensors[0]).abs().mean())
    for delta in deltas:
        assert float(delta.abs().mean()) == pytest.approx(whole, rel=5 * deviation / density)
    assert float(deltas[0].std()) == pytest.approx(float(deltas[1].std()), rel=0.05)


def test_the_mean_over_seeds_is_the_whole_task_vector() -> None:
    base, one = family(64, count=1)
    runs = [
        merge("dare_linear", [base, one], weights(1.0, density=0.5), base=0, seed=seed) for seed in range(400)
    ]
    # A kept element is 2 δ, a dropped one 0: standard deviation |δ| each.
    error = (torch.stack(runs).mean(0) - one).abs() / (one - base).abs()
    assert float(error.max()) < 5 / math.sqrt(400)
