"""DELLA without election; its distribution is compared with mergekit's in `test_della`."""

from __future__ import annotations

import torch

from .inputs import family, merge, weights


def test_pruned_task_vectors_are_added() -> None:
    base, one, two = family(33, 17, count=2)
    alone = [
        # One at a time, but as the same source: its position is part of the hash.
        merge("della_linear", [base, one, base], weights(1.0, 0.0, density=0.5), base=0) - base,
        merge("della_linear", [base, base, two], weights(0.0, 1.0, density=0.5), base=0) - base,
    ]
    values = weights(0.5, -2.0, density=0.5)
    merged = merge("della_linear", [base, one, two], values, base=0, **{"lambda": 0.3})
    torch.testing.assert_close(merged, base + 0.3 * (0.5 * alone[0] - 2 * alone[1]), rtol=1e-5, atol=1e-6)
    normalized = merge("della_linear", [base, one, two], values, base=0, normalize=True)
    expected = base + (0.5 * alone[0] - 2 * alone[1]) / -1.5
    torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-6)


def test_signs_are_not_elected() -> None:
    tensors = [[0.0, 0.0], [3.0, -1.0], [-1.0, -2.0]]
    assert merge("della_linear", tensors, weights(1.0, 1.0), base=0).tolist() == [2.0, -3.0]


def test_it_does_not_normalise_by_default() -> None:
    ones = [torch.zeros(4), torch.ones(4), torch.ones(4)]
    assert merge("della_linear", ones, weights(0.5, 1.0), base=0).tolist() == [1.5] * 4
