"""How measured numbers are written for people: never without the error they are known with."""

from __future__ import annotations


def with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    """A score with its standard error, such as `0.7125 ± 0.0320`; `± ?` where the error is not known.

    Args:
        value: The score.
        error: Its standard error.
        signed: Whether to write a plus, for differences.
    """
    return f"{value:{'+' if signed else ''}.4f} ± {'?' if error is None else f'{error:.4f}'}"


def as_share(share: float) -> str:
    """A share in percent, such as `3.5 %`."""
    return f"{100 * share:.1f} %"
