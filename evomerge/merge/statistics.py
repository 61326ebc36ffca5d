"""Statistics of the sources, computed once and kept: they never change during a search, only recipes do.

A histogram, a Gram matrix or the ranks within rows belong to tensors of certain content, so a file's name is
the hash of what they were computed from, and a file is used as long as the sources' hashes hold. Files are
memory-mapped by every process of a host; one process computes an entry while the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Raised when what a file holds changes its meaning."""

Key = tuple[str, str]
"""A model as the recipe names it, and the name of one of its tensors."""


class StatisticsStore:
    """Arrays by what they were computed from; on disk when given a folder, else in memory only.

    Args:
        folder: Where to keep them, or None.
        content_hash: Model -> hash of its content.
    """

    def __init__(self, folder: Path | None, content_hash: Callable[[str], str]) -> None:
        self._folder = folder
        self._content_hash = content_hash
        self._hashes: dict[str, str] = {}
        self._known: dict[tuple[str, Sequence[Key], Key | None], NDArray[Any]] = {}

    def get(
        self, kind: str, tensors: Sequence[Key], base: Key | None, compute: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        """An array, computed if it is not known yet; never write to it.

        Args:
            kind: What it is.
            tensors: What it is computed from, in order.
            base: What the tensors are taken relative to, or None.
            compute: Computes it.
        """
        key = (kind, tuple(tensors), base)
        if key not in self._known:
            self._known[key] = self._load(kind, tensors, base, compute)
        return self._known[key]

    @property
    def num_loaded(self) -> int:
        """How many arrays were computed or read from the folder; each is kept."""
        return len(self._known)

    def _load(
        self, kind: str, tensors: Sequence[Key], base: Key | None, compute: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        if self._folder is None:
            return compute()
        relative_to = None if base is None else self._content(base)
        parts = [FORMAT, kind, [self._content(key) for key in tensors], relative_to]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = self._folder / name[:2] / f"{name[2:34]}.npy"
        found = _read(path)
        if found is not None:
            return found
        with _locked(path.with_suffix(".lock")):
            found = _read(path)
            if found is None:
                computed = compute()
                _write(path, computed)
                # The file's pages are shared with the other processes, those of what was computed are not.
                found = _read(path)
        return computed if found is None else found

    def _content(self, key: Key) -> list[str]:
        model, tensor = key
        if model not in self._hashes:
            self._hashes[model] = self._content_hash(model)
        return [self._hashes[model], tensor]


def _read(path: Path) -> NDArray[Any] | None:
    """The array, mapped; None if there is none or it is damaged."""
    try:
        # Copy on write: pages are shared between processes, and torch asks for memory it may write to.
        array: NDArray[Any] = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError):  # all of them NumPy's
        return None
    return array


def _write(path: Path, array: NDArray[Any]) -> None:
    """Write an array so that it appears complete or not at all; without room it is computed again next time."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        partial.replace(path)
    except OSError:
        _remove(partial)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for other processes; where a folder cannot be written or has no locks, several may compute the same."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(path.open("wb"))
            stack.callback(_remove, path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
