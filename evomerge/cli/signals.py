"""SIGTERM and SIGUSR1, which schedulers send before they take a machine away, become an orderly stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from evomerge.loop import StopFlag


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM and SIGUSR1 set; the run then stops between evaluations with exit code 75."""
    stop = StopFlag()

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.set(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
