"""Threads for the loops, as many as torch has; the loops do not hold Python's lock."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_local = threading.local()


def num_threads() -> int:
    """How many threads a piece of work may be spread over: one if it is done by one of several already."""
    if getattr(_local, "inside", False):
        return 1
    # A process that merges without torch should not load it to be told a number.
    torch = sys.modules.get("torch")
    return _usual_threads() if torch is None else int(torch.get_num_threads())


def _usual_threads() -> int:
    """As torch chooses: what OpenMP is told, else a thread per core that the process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(work: Callable[[Item], Result], parts: Sequence[Item]) -> list[Result]:
    """Do the work for every part; the results are in the parts' order.

    When it returns or raises, no part is at work any more.
    """
    if len(parts) <= 1 or num_threads() == 1:
        return [work(part) for part in parts]
    futures = [_pool().submit(work, part) for part in parts]
    wait(futures)
    return [future.result() for future in futures]


def start(work: Callable[[], Result]) -> Future[Result]:
    """Have work done by the next free thread; without several of them, at once."""
    if num_threads() > 1:
        return _pool().submit(work)
    future: Future[Result] = Future()
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
    return future


def _pool() -> ThreadPoolExecutor:
    # By process too: threads do not survive a fork.
    key = (os.getpid(), num_threads())
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(key[1], "evomerge-kernel", initializer=_enter)
    return _pools[key]


def _enter() -> None:
    _local.inside = True
