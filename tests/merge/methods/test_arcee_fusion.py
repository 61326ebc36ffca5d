"""Arcee Fusion: changes that stand out are taken over."""

from __future__ import annotations

import pytest
import torch

from evomerge.merge.methods.arcee_fusion import importance, outlier_threshold

from .inputs import close, family, merge, mergekit


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1001])
def test_the_threshold_is_that_of_outliers(count: int) -> None:
    scores = torch.arange(count, dtype=torch.float32)[torch.randperm(count)]
    first, median, third = (int(share * (count - 1)) for share in (0.25, 0.5, 0.75))
    assert float(outlier_threshold(scores)) == median + 1.5 * (third - first)


def test_an_element_is_the_base_or_the_other_model() -> None:
    base, other = family(20, 30, count=1, change=1.0)
    merged = merge("arcee_fusion", [base, other], base=0)
    scores = importance(other, base)
    fused = scores >= outlier_threshold(scores)
    assert 0 < int(fused.sum()) < 150
    torch.testing.assert_close(merged, torch.where(fused, other, base))


def test_rows_that_stay_the_same_distribution_do_not_matter() -> None:
    base, other = family(20, 30, count=1, change=0.1)
    other[3] = base[3] + 5.0  # a softmax does not see a shift
    other[4] = base[4] * 5.0
    merged = merge("arcee_fusion", [base, other], base=0)
    assert torch.equal(merged[3], base[3])
    assert not torch.equal(merged[4], base[4])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (17, 31), (2, 3, 5), (1000,), (9, 1)])
@pytest.mark.parametrize("change", [0.0, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("base", [0, 1])
def test_it_is_mergekits(shape: tuple[int, ...], change: float, base: int) -> None:
    tensors = family(*shape, count=1, change=change)
    close(merge("arcee_fusion", tensors, base=base), mergekit("arcee_fusion", tensors, base=base))


def test_the_whole_of_a_large_tensor_decides() -> None:
    """mergekit estimates the quartiles from a sample here: all but a few elements agree."""
    tensors = family(1200, 1000, count=1, change=0.1)
    torch.manual_seed(0)
    ours, theirs = (run("arcee_fusion", tensors, base=0) for run in (merge, mergekit))
    assert torch.equal(ours, merge("arcee_fusion", tensors, base=0))
    differ = float((ours != theirs).float().mean())
    assert differ < 0.01
