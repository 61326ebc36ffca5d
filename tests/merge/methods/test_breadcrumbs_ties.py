"""Model Breadcrumbs with TIES' election of signs; mergekit's numbers are compared in `test_breadcrumbs`."""

from __future__ import annotations

import torch

from .inputs import family, merge, weights


def test_it_is_ties_on_masked_task_vectors() -> None:
    base, one, two = family(33, 17, count=2)
    zero = torch.zeros_like(base)
    masked = [
        # One at a time, but as the same source: its position is part of the hash.
        merge("breadcrumbs", [base, one, base], weights(1.0, 0.0, density=0.5, gamma=0.1), base=0) - base,
        merge("breadcrumbs", [base, base, two], weights(0.0, 1.0, density=0.5, gamma=0.1), base=0) - base,
    ]
    values = weights(0.5, 0.7, density=0.5, gamma=0.1)
    merged = merge("breadcrumbs_ties", [base, one, two], values, base=0, normalize=True)
    expected = base + merge("ties", [zero, *masked], weights(0.5, 0.7), base=0, normalize=True)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_it_does_not_normalise_by_default() -> None:
    ones = [torch.zeros(4), torch.ones(4), torch.ones(4)]
    assert merge("breadcrumbs_ties", ones, weights(0.5, 1.0), base=0).tolist() == [1.5] * 4


def test_signs_are_elected() -> None:
    tensors = [[0.0, 0.0], [3.0, -1.0], [-1.0, -2.0]]
    assert merge("breadcrumbs_ties", tensors, weights(1.0, 1.0), base=0).tolist() == [3.0, -3.0]
    assert merge("breadcrumbs", tensors, weights(1.0, 1.0), base=0).tolist() == [2.0, -3.0]
