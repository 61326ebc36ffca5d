"""DARE-TIES: dropped like DARE, merged like TIES."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import ks_2samp

from evomerge.merge.counter_hash import keep_mask

from .inputs import family, merge, mergekit, weights

SIZE = 1 << 14


def test_it_is_ties_on_dropped_and_rescaled_task_vectors() -> None:
    base, one, two = family(SIZE, count=2)
    merged = merge("dare_ties", [base, one, two], weights(0.5, 0.7, density=0.5), base=0, normalize=True)
    masks = [keep_mask(SIZE, 0.5, seed=0, tensor_name="w", source=source) for source in (1, 2)]
    dropped = [base + 2 * mask * (tensor - base) for mask, tensor in zip(masks, (one, two), strict=True)]
    expected = merge("ties", [base, *dropped], weights(0.5, 0.7), base=0, normalize=True)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_it_has_mergekits_distribution(normalize: bool) -> None:
    tensors = family(SIZE, count=2)
    given = {"values": weights(0.5, 0.8, density=0.4), "base": 0, "normalize": normalize}
    torch.manual_seed(1234)  # not that of `family`, whose numbers it would repeat
    ours, theirs = (run("dare_ties", tensors, **given) - tensors[0] for run in (merge, mergekit))
    # Kolmogorov-Smirnov, at a chance of 1 in 1000 of equal distributions differing by more.
    assert ks_2samp(ours, theirs).statistic < 1.95 * math.sqrt(2 / SIZE)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)


def test_it_does_not_normalise_by_default() -> None:
    ones = [torch.zeros(4), torch.ones(4), torch.ones(4)]
    assert merge("dare_ties", ones, weights(0.5, 1.0, density=1.0), base=0).tolist() == [1.5] * 4
