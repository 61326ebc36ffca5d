"""How fast this machine multiplies and copies, measured in about a second.

On the CPU every thread that the workers will have works at the same time, as they share the memory's
bandwidth. Counted is the time in which they run, and the best of a few short rounds, so that what other programs
take does not matter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.plan.records import Machine

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3
ROUND_SECONDS = 0.08
MOST_SECONDS = 0.3
"""What a round takes at most on a machine that is busy with other programs."""
PROMPT_ROWS = 512
MAX_WIDTH = 2048
COPY_BYTES = 1 << 25
WEIGHT_BYTES = 1 << 28
"""Weights that all threads together go through at most; more than any cache holds."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to measure the speed for.

    Attributes:
        device: Where models are.
        dtype: Their type, as torch names it.
        width: Size of their hidden states.
        weight_bytes: Bytes of a model's weights.
        rows: Rows of a batch.
        workers: Number of workers.
        threads: CPU threads of each.
    """

    device: str
    dtype: str
    width: int
    weight_bytes: int
    rows: int
    workers: int
    threads: int


def measure(load: Load) -> Machine:
    """Measure what one worker will have while all of them are busy."""
    import torch

    on_cpu = not load.device.startswith("cuda")
    lanes = min(os.cpu_count() or 1, load.workers * load.threads) if on_cpu else 1
    sharing = load.workers if on_cpu else -(-load.workers // torch.cuda.device_count())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Threads that torch did not start itself do not know of the number set above.
        with (
            torch.no_grad(),
            ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            bench = _Bench(load, lanes, pool)
            prompt, decode, copied = bench.prompt(), bench.decode(), bench.copy()
            calls = bench.calls()
    finally:
        torch.set_num_threads(threads)
    return Machine(
        prompt_flops=prompt / sharing,
        decode_flops=decode / sharing,
        bytes_per_second=copied / sharing,
        call_seconds=1 / calls,
    )


class _Bench:
    """The measurements; each gives work per second of all lanes together."""

    def __init__(self, load: Load, lanes: int, pool: ThreadPoolExecutor) -> None:
        self._load = load
        self._lanes = lanes
        self._pool = pool
        self._on_gpu = load.device.startswith("cuda")
        self._width = max(16, min(load.width, MAX_WIDTH))

    def prompt(self) -> float:
        return self._products(PROMPT_ROWS, self._width)

    def decode(self) -> float:
        share = min(self._load.weight_bytes, WEIGHT_BYTES // self._lanes)
        itemsize = self._random(1, 1).itemsize
        return self._products(self._load.rows, max(self._width, share // itemsize // self._width))

    def copy(self) -> float:
        import torch

        def start() -> Callable[[], object]:
            source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self._load.device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)

        return self._rate(start) * 2 * COPY_BYTES

    def calls(self) -> float:
        import torch

        layer = torch.nn.Linear(16, 16, device=self._load.device)
        rows = torch.ones(1, 16, device=self._load.device)
        return max(self._round(lambda: layer(rows)) for _ in range(ROUNDS))

    def _products(self, rows: int, outputs: int) -> float:
        import torch

        def start() -> Callable[[], object]:
            left, weight = self._random(rows, self._width), self._random(outputs, self._width)
            return lambda: torch.nn.functional.linear(left, weight)

        return self._rate(start) * 2 * rows * outputs * self._width

    def _random(self, rows: int, columns: int) -> Tensor:
        import torch

        # Not zeros: some hardware is faster with them.
        small = torch.rand(min(rows, 64), columns, device=self._load.device).sub_(0.5)
        return small.to(getattr(torch, self._load.dtype)).repeat(-(-rows // 64), 1)[:rows].contiguous()

    def _rate(self, start: Callable[[], Callable[[], object]]) -> float:
        """Calls per second of all lanes together, in the best round."""
        works = [start() for _ in range(self._lanes)]
        for work in works:
            work()
        return max(sum(self._pool.map(self._round, works)) for _ in range(ROUNDS))

    def _round(self, work: Callable[[], Any]) -> float:
        """Calls per second of one lane."""
        count, seconds = 0, 0.0
        self._wait()
        begun = time.perf_counter()
        started = self._clock()
        while seconds < ROUND_SECONDS and time.perf_counter() - begun < MOST_SECONDS:
            work()
            count += 1
            if count & (count - 1) == 0:
                self._wait()
            seconds = self._clock() - started
        self._wait()
        return count / (self._clock() - started)

    def _clock(self) -> float:
        """Time at which the lane worked; on the CPU without what other programs took."""
        return time.perf_counter() if self._on_gpu else time.thread_time()

    def _wait(self) -> None:
        """A GPU answers before it is done."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
