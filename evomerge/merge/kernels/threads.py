"""Threads for the loops, as many as torch has; the loops do not hold Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_local = threading.local()


def num_threads() -> int:
    """How many threads a piece of work may be spread over: one if it is done by one of several already."""
    import torch

    return 1 if getattr(_local, "inside", False) else torch.get_num_threads()


def spread(work: Callable[[Item], Result], parts: Sequence[Item]) -> list[Result]:
    """Do the work for every part; the results are in the parts' order.

    When it returns or raises, no part is at work any more.
    """
    if len(parts) <= 1 or num_threads() == 1:
        return [work(part) for part in parts]
    futures = [_pool().submit(work, part) for part in parts]
    wait(futures)
    return [future.result() for future in futures]


def _pool() -> ThreadPoolExecutor:
    # By process too: threads do not survive a fork.
    key = (os.getpid(), num_threads())
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(key[1], "evomerge-kernel", initializer=_enter)
    return _pools[key]


def _enter() -> None:
    _local.inside = True
