"""Numbers for people come with the error they are known with."""

from __future__ import annotations

from evomerge.measured import as_share, with_error


def test_an_error_that_is_not_known_is_not_zero() -> None:
    assert with_error(0.71249, 0.0321) == "0.7125 ± 0.0321"
    assert with_error(1.0, 0.0) == "1.0000 ± 0.0000"
    assert with_error(-0.5, None) == "-0.5000 ± ?"


def test_shares_are_in_percent() -> None:
    assert as_share(0.0349) == "3.5 %"
