"""Linear: the weighted average."""

from __future__ import annotations

import pytest
import torch

from .inputs import close, family, merge, mergekit

A, B = [1.0, 2.0, -4.0], [3.0, 0.0, 4.0]


def both(a: float, b: float) -> list[dict[str, float]]:
    return [{"weight": a}, {"weight": b}]


def test_weights_are_divided_by_their_sum() -> None:
    assert merge("linear", [A, B], both(1, 3)).tolist() == [2.5, 0.5, 2.0]


def test_weights_count_as_they_are_without_normalisation() -> None:
    assert merge("linear", [A, B], both(1, -0.5), normalize=False).tolist() == [-0.5, 2.0, -6.0]


def test_weights_that_sum_to_0_have_no_average() -> None:
    assert not merge("linear", [A, B], both(1, -1)).isfinite().any()


@pytest.mark.parametrize("numbers", [(0.2, 0.5, 0.9, 0.1), (1, -0.25, 0.5, 0), (0, 0, 1, 0)])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_mergekits(numbers: tuple[float, ...], normalize: bool) -> None:
    values = [{"weight": number} for number in numbers]
    tensors = family(13, 7)
    close(
        merge("linear", tensors, values, normalize=normalize),
        mergekit("linear", tensors, values, normalize=normalize),
    )


def test_equal_models_average_to_themselves() -> None:
    tensor = torch.linspace(-1, 1, 9)
    torch.testing.assert_close(merge("linear", [tensor, tensor.clone()], both(0.3, 0.9)), tensor)
