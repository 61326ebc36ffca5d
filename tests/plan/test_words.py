"""Numbers as people read them."""

from __future__ import annotations

import pytest

from evomerge.plan.records import Span
from evomerge.plan.words import count, duration, durations, flops, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_700, "1 MB"),
        (14_483_464_192, "14.5 GB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("number", "text"), [(580, "580"), (33_600, "33.6 k"), (134_515_008, "135 M"), (7_241_732_096, "7.24 B")]
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert count(number) == text


def test_speeds_are_told_in_flops() -> None:
    assert flops(4e11) == "400 GFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.114, "0.11 s"), (9.96, "10 s"), (89, "89 s"), (90, "1.5 min"), (3600, "60 min"), (12_600, "3.5 h")],
)
def test_durations_are_rough(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (20, 45, "20 to 45 s"),
        (20, 180, "20 s to 3 min"),
        (20.1, 20.2, "20 s"),
        (8e4, 8e5, "22 h to 9.3 days"),
    ],
)
def test_a_span_names_a_unit_once(low: float, high: float, text: str) -> None:
    assert durations(Span(low=low, high=high)) == text
