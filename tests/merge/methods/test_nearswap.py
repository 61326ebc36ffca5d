"""NearSwap: elements near the base's are swapped, others move a little."""

from __future__ import annotations

import pytest
import torch

from .inputs import close, family, merge, mergekit


def test_near_elements_are_swapped_and_others_move_by_t() -> None:
    merged = merge("nearswap", [[1.0, 1.0, 1.0], [1.25, 5.0, -1.0]], base=0, t=0.5)
    torch.testing.assert_close(merged, torch.tensor([1.25, 1.5, 0.5]))


def test_0_is_the_base() -> None:
    tensors = family(5, 5, count=1)
    assert torch.equal(merge("nearswap", tensors, base=0, t=0.0), tensors[0])


def test_distances_that_hardly_exist_count_as_a_millionth() -> None:
    base, other = torch.zeros(2), torch.tensor([1e-7, 0.0])
    torch.testing.assert_close(
        merge("nearswap", [base, other], base=0, t=5e-7), torch.tensor([5e-8, 0.0]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("shape", [(), (1,), (7,), (17, 31), (2, 3, 5)])
@pytest.mark.parametrize("t", [0.0, 1e-8, 1e-4, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("change", [0.0, 1e-7, 0.1, 1.0])
@pytest.mark.parametrize("base", [0, 1])
def test_it_is_mergekits(shape: tuple[int, ...], t: float, change: float, base: int) -> None:
    tensors = family(*shape, count=1, change=change)
    close(merge("nearswap", tensors, base=base, t=t), mergekit("nearswap", tensors, base=base, t=t))
