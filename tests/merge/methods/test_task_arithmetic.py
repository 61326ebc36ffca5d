"""Task arithmetic: the base plus weighted task vectors."""

from __future__ import annotations

import torch

from .inputs import family, merge, weights

BASE, ONE, TWO = [1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 3.0, 5.0]


def test_weighted_task_vectors_are_added() -> None:
    merged = merge("task_arithmetic", [BASE, ONE, TWO], weights(0.5, 2.0), base=0)
    assert merged.tolist() == [1.5, 5.0, 8.5]


def test_normalisation_divides_by_the_sum_of_weights() -> None:
    merged = merge("task_arithmetic", [BASE, ONE, TWO], weights(1.0, 3.0), base=0, normalize=True)
    assert merged.tolist() == [1.25, 2.5, 3.75]


def test_weights_that_cancel_are_not_divided_by() -> None:
    merged = merge("task_arithmetic", [BASE, ONE, TWO], weights(1.0, -1.0), base=0, normalize=True)
    assert merged.tolist() == [2.0, -1.0, -4.0]


def test_lambda_scales_what_is_added() -> None:
    merged = merge("task_arithmetic", [BASE, ONE], weights(1.0), base=0, **{"lambda": -2.0})
    assert merged.tolist() == [-1.0, 1.0, 3.0]


def test_int8_mask_changes_nothing() -> None:
    tensors = family(5, 5)
    plain, masked = (
        merge("task_arithmetic", tensors, weights(1, 2, 3), base=0, int8_mask=value)
        for value in (False, True)
    )
    assert torch.equal(plain, masked)
