"""SLERP: along the arc from the base to the other model."""

from __future__ import annotations

import math

import pytest
import torch

from .inputs import close, family, merge, mergekit


def test_half_way_between_two_axes_is_the_diagonal() -> None:
    merged = merge("slerp", [[1.0, 0.0], [0.0, 1.0]], base=0, t=0.5)
    torch.testing.assert_close(merged, torch.full((2,), math.sqrt(0.5)))


def test_a_third_of_a_right_angle_is_30_degrees() -> None:
    merged = merge("slerp", [[2.0, 0.0], [0.0, 2.0]], base=0, t=1 / 3)
    torch.testing.assert_close(merged, torch.tensor([math.sqrt(3), 1.0]))


@pytest.mark.parametrize("base", [0, 1])
def test_0_is_the_base_and_1_the_other(base: int) -> None:
    tensors = family(4, 4, count=1, change=1.0)
    torch.testing.assert_close(merge("slerp", tensors, base=base, t=0.0), tensors[base])
    torch.testing.assert_close(merge("slerp", tensors, base=base, t=1.0), tensors[1 - base])


def test_nearly_parallel_tensors_are_interpolated_linearly() -> None:
    a, b = family(50, count=1, change=1e-4)
    torch.testing.assert_close(merge("slerp", [a, b], base=0, t=0.25), 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0, -0.5, 1.5])
@pytest.mark.parametrize("change", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("base", [0, 1])
def test_it_is_mergekits(t: float, change: float, base: int) -> None:
    tensors = family(9, 14, count=1, change=change)
    ours, theirs = (run("slerp", tensors, base=base, t=t) for run in (merge, mergekit))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6 * max(1, change))


def test_tensors_too_short_for_a_direction_are_handled_as_in_mergekit() -> None:
    pair = [torch.tensor([1e-9, 0.0]), torch.tensor([3e-9, 4e-9])]
    ours, theirs = (run("slerp", pair, base=0, t=0.3) for run in (merge, mergekit))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "tensors", [([0.0, 0.0], [1.0, 2.0]), ([0.0], [0.0]), ([1.0, 2.0], [-1.0, -2.0]), ([3.0], [-2.0])]
)
def test_zeros_and_opposites_are_handled_as_in_mergekit(tensors: tuple[list[float], list[float]]) -> None:
    pair = [torch.tensor(values) for values in tensors]
    close(merge("slerp", pair, base=0, t=0.3), mergekit("slerp", pair, base=0, t=0.3))
