"""Statistics of arrays do not depend on how they are read; everything else is tested by `test_cpu`."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evomerge.merge.histogram import Histogram
from evomerge.merge.kernels import cpu_arrays


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def pair() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A base, and a source of which a third is equal to it."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal(10_000).astype(np.float32)
    change = generator.standard_normal(10_000).astype(np.float32) * (generator.random(10_000) > 0.3)
    return base, base + change


@pytest.mark.parametrize("piece", [1, 77, 1 << 17])
@pytest.mark.parametrize("block", [100, 999, 1 << 22])
def test_a_histogram_is_the_same_in_any_pieces(
    piece: int,
    block: int,
    threads: int,
    pair: tuple[NDArray[np.float32], NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, source = pair
    monkeypatch.setattr(cpu_arrays, "BLOCK", block)
    monkeypatch.setattr(cpu_arrays, "PIECE", 64)
    done: list[tuple[int, int]] = []
    scratch = threading.local()

    def read(first: int, end: int) -> list[NDArray[np.float32]]:
        # What was read before may be gone: every thread has memory for one piece.
        scratch.__dict__.setdefault("memory", np.empty((2, 1 << 17), np.float32))
        for row, array in zip(scratch.memory, pair, strict=True):
            row[: end - first] = array[first:end]
        return [row[: end - first] for row in scratch.memory]

    count = 3_000
    found = cpu_arrays.histogram(read, count, piece=piece, done=lambda *run: done.append(run))
    expected = Histogram.of(torch.from_numpy(source[:count] - base[:count]))
    np.testing.assert_array_equal(found.table, expected.table)
    assert sum(length for _, length in done) == count
    assert [first for first, _ in done] == list(range(0, count, block))


def test_one_histogram_leaves_nothing_behind_for_the_next(
    threads: int, pair: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    def of(source: NDArray[np.float32]) -> Histogram:
        return cpu_arrays.histogram(lambda first, end: [pair[0][first:end], source[first:end]], 10_000)

    first, other, again = of(pair[1]), of(pair[1] * 3), of(pair[1])
    assert other.norm > first.norm
    np.testing.assert_array_equal(first.table, again.table)
