"""RAM+: RAM with what one model alone changed made stronger."""

from __future__ import annotations

import pytest
import torch

from .inputs import close, family, merge, mergekit
from .test_ram import sparse

BASE = [0.0, 0.0, 0.0, 0.0, 0.0]
A, B = [4.0, 4.0, 4.0, 4.0, 0.0], [8.0, 0.0, 0.0, 0.0, 8.0]


def test_what_is_unique_grows_with_the_share_that_is_shared() -> None:
    # A shares one element and has three of its own, B one of each: ratios 1/3 and 1.
    merged = merge("ramplus_tl", [BASE, A, B], base=0, r=0.3, alpha=10.0)
    torch.testing.assert_close(merged, torch.tensor([6.0, 4.4, 4.4, 4.4, 8 * 1.3]))


def test_the_ratio_counts_up_to_alpha() -> None:
    merged = merge("ramplus_tl", [BASE, A, B], base=0, r=0.3, alpha=0.5)
    torch.testing.assert_close(merged, torch.tensor([6.0, 4.4, 4.4, 4.4, 8 * 1.15]))


def test_without_r_it_is_ram() -> None:
    tensors = sparse(17, 31, count=3)
    close(merge("ramplus_tl", tensors, base=0, r=0.0), merge("ram", tensors, base=0))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (17, 31), (2, 3, 5)])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1, 3.0])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.7, 2.0), (-0.5, 0.2), (1.0, 0.0)])
def test_it_is_mergekits(shape: tuple[int, ...], count: int, epsilon: float, r: float, alpha: float) -> None:
    for tensors in (family(*shape, count=count), sparse(*shape, count=count)):
        given = {"base": 0, "epsilon": epsilon, "r": r, "alpha": alpha}
        close(merge("ramplus_tl", tensors, **given), mergekit("ramplus_tl", tensors, **given))


def test_a_model_without_an_element_of_its_own_is_no_division_by_0() -> None:
    one = [1.0, 1.0]
    merged = merge("ramplus_tl", [[0.0, 0.0], one, one, [0.0, 0.0]], base=0, epsilon=0.0)
    assert merged.tolist() == [1.0, 1.0]


def test_models_equal_to_the_base_change_nothing() -> None:
    (base,) = family(5, 5, count=0)
    assert torch.equal(merge("ramplus_tl", [base, base.clone(), base.clone()], base=0), base)
