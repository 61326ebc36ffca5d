"""What the methods on task vectors share: ranks, chances, factors and divisors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evomerge.merge.methods.base import TaskVectorInputs
from evomerge.merge.methods.task_vectors import (
    RANKS,
    Random,
    Ranked,
    TaskVectorSum,
    Term,
    parameters,
    ranked_line,
    row_ranks,
    terms,
)

from .inputs import family


@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 5), (1, 8), (3, 2), (1, 70_000)])
def test_ranks_run_from_0_to_the_largest_in_every_row(shape: tuple[int, ...]) -> None:
    delta = family(*shape)[0]
    ranks = row_ranks(delta)
    assert ranks.shape == delta.shape
    rows = zip(delta.view(-1, shape[-1]), ranks.view(-1, shape[-1]), strict=True)
    for magnitudes, found in ((row.abs(), found) for row, found in rows):
        order = torch.from_numpy(np.argsort(magnitudes.numpy(), kind="stable"))
        line = torch.linspace(0, RANKS, shape[-1], dtype=torch.float64)
        assert (found[order].double() - line).abs().max() <= 0.5
        assert (int(found.min()), int(found.max())) == (0, RANKS)


def test_elements_of_equal_magnitude_are_ranked_by_position() -> None:
    assert row_ranks(torch.tensor([[1.0, -1.0, 0.5, 1.0, -1.0, 1.0]])).tolist() == [
        [RANKS // 5, 2 * RANKS // 5, 0, 3 * RANKS // 5, 4 * RANKS // 5, RANKS]
    ]


@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_alone_in_its_row_an_element_has_the_middle_rank(shape: tuple[int, ...]) -> None:
    ranks = row_ranks(torch.full(shape, 3.0))
    assert ranks.shape == shape
    assert set(ranks.flatten().tolist()) == {RANKS // 2}


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_nothing_has_no_rank(shape: tuple[int, ...]) -> None:
    assert row_ranks(torch.zeros(shape)).shape == shape


def test_broken_elements_have_the_highest_rank() -> None:
    assert row_ranks(torch.tensor([math.nan, 1.0, math.inf])).tolist() == [RANKS, 0, (RANKS + 1) // 2]


def test_chances_run_from_the_lowest_to_the_highest() -> None:
    lowest, step = ranked_line(Ranked(lowest=0.25, highest=0.75, rescale=False))
    assert (lowest, lowest + RANKS * step) == (0.25, pytest.approx(0.75, rel=1e-6))
    assert (np.float32(lowest), np.float32(step)) == (lowest, step)


@pytest.mark.parametrize("density", [1e-12, 2.0**-33, 2.0**-32, 0.3, 0.5, 1 - 2.0**-32, 1.0])
def test_the_share_of_hashes_is_the_density(density: float) -> None:
    assert Random.share(density).last + 1 == round(density * 2**32)


def test_factors_are_rounded_once() -> None:
    numbers = [(i / 7, j / 9) for i in range(1, 20) for j in range(1, 20)]
    found = [Term(source=1, weight=weight, rescale=rescale).factor for weight, rescale in numbers]
    assert found == [float(np.float32(weight * rescale)) for weight, rescale in numbers]
    assert found != [float(np.float32(weight) * np.float32(rescale)) for weight, rescale in numbers]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0.5, 0.25), 0.75),
        ((1.0, -1.0), 1.0),
        ((1e-9, 0.0), 1.0),
        ((1e-7, 0.0), float(np.float32(1e-7))),
        ((-2.0, 0.5), -1.5),
        ((), 1.0),
    ],
)
def test_a_sum_of_weights_next_to_0_is_not_divided_by(numbers: tuple[float, ...], expected: float) -> None:
    some = tuple(Term(source=index, weight=weight) for index, weight in enumerate(numbers))

    def divisor(*, elect: bool, normalize: bool) -> float:
        return TaskVectorSum(terms=some, elect=elect, normalize=normalize, scale=1.0).divisor

    assert divisor(elect=False, normalize=True) == expected
    assert divisor(elect=False, normalize=False) == 1.0
    # Electing, the divisor is each element's own.
    assert divisor(elect=True, normalize=True) == 1.0


def test_every_other_input_is_a_term_in_the_recipes_order() -> None:
    def no_histogram(source: int) -> None:
        raise AssertionError

    given = TaskVectorInputs(
        name="w",
        shape=(3,),
        others=[0, 2],
        shared={},
        values=({"weight": 0.5}, {}, {"weight": -1.0}),
        histogram=no_histogram,  # type: ignore[arg-type]
    )
    assert terms(given) == (Term(source=0, weight=0.5), Term(source=2, weight=-1.0))
    found = terms(given, lambda source: (Random(last=source), 2.0))
    assert [(term.keep, term.rescale) for term in found] == [(Random(last=0), 2.0), (Random(last=2), 2.0)]


def test_methods_declare_the_parameters_they_have() -> None:
    plain = {item.name: item for item in parameters(normalize=True)}
    assert set(plain) == {"weight", "normalize", "lambda", "int8_mask"}
    assert plain["normalize"].default is True
    full = {item.name: item for item in parameters(normalize=False, density="Share.", rescale=True)}
    assert set(full) - set(plain) == {"density", "rescale"}
    assert full["rescale"].default is True
    with pytest.raises(ValueError, match="expected a number in"):
        full["density"].check(0.0)
