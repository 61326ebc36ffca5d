"""RAM: averaged where models overlap, whole where one alone changed."""

from __future__ import annotations

import pytest
import torch

from .inputs import close, family, merge, mergekit

BASE = [1.0, 1.0, 1.0, 1.0]
A, B = [3.0, 1.0, 5.0, 1.0], [5.0, 3.0, 1.0, 1.0]


def sparse(*shape: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    """A base and models that each changed a third of its elements."""
    base, *others = family(*shape, count=count, seed=seed)
    keep = torch.Generator().manual_seed(seed + 1)
    return [
        base,
        *(torch.where(torch.rand(base.shape, generator=keep) < 1 / 3, other, base) for other in others),
    ]


def test_an_element_is_averaged_over_the_models_that_changed_it() -> None:
    assert merge("ram", [BASE, A, B], base=0).tolist() == [4.0, 3.0, 5.0, 1.0]


def test_a_change_up_to_epsilon_is_none() -> None:
    tensors = [[0.0, 0.0], [0.5, 0.25], [0.75, 0.5]]
    assert merge("ram", tensors, base=0, epsilon=0.5).tolist() == [0.75, 0.0]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (17, 31), (2, 3, 5)])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
def test_it_is_mergekits(shape: tuple[int, ...], count: int, epsilon: float) -> None:
    for tensors in (family(*shape, count=count), sparse(*shape, count=count)):
        given = {"base": 0, "epsilon": epsilon}
        close(merge("ram", tensors, **given), mergekit("ram", tensors, **given))


def test_models_equal_to_the_base_change_nothing() -> None:
    (base,) = family(5, 5, count=0)
    assert torch.equal(merge("ram", [base, base.clone(), base.clone()], base=0), base)
