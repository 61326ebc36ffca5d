"""Silence for libraries that print while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' progress bars and messages off the terminal; their errors are raised as well."""
    import datasets

    was_enabled = datasets.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(_Discard()), contextlib.redirect_stdout(_Discard()):
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if was_enabled:
            datasets.enable_progress_bars()


class _Discard:
    """A text stream that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return

    def close(self) -> None:
        """Stay open: a logger made meanwhile closes it when Python ends."""

    def isatty(self) -> bool:
        return False
