"""Batches come in order, hold as much as a buffer, and leave no thread at work behind them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.stream import TensorStream
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError
from evomerge.merge import batches as batches_module
from evomerge.merge.batches import Batches
from evomerge.merge.memory import Memory
from evomerge.merge.methods import METHODS
from evomerge.merge.native import NativeTensor
from evomerge.merge.plan import TensorPlan
from tests.checkpoints.files import model

MEMORY = Memory(budget=None, buffer_bytes=1024, held_bytes=0)
SIZES = [3, 100, 200, 300, 5000, 1, 511, 513, 512, 0, 2, 1025]
"""Elements of two bytes: a buffer holds 512."""


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr("evomerge.merge.memory.GRAIN", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def models(folder: Path, spoilt: str = "") -> dict[str, Checkpoint]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in ("base", "one"):
        state = {
            f"t{n:02}": torch.randn(size, generator=generator).bfloat16() for n, size in enumerate(SIZES)
        }
        if name == "one" and spoilt:
            state[spoilt][-1] = float("nan")
        found[name] = Checkpoint.open(model(folder / name, state))
    return found


def plan_of(name: str, size: int, method: str) -> TensorPlan:
    return TensorPlan(
        name=name,
        shape=(size,),
        dtype="bfloat16",
        inputs=(("base", name), ("one", name)),
        base=0 if method == "ties" else None,
        method=METHODS[method],
        shared={"normalize": True, "lambda": 1.0, "rescale": False},
        values=({"weight": 0.5, "density": 0.5}, {"weight": 0.25, "density": 0.5}),
        seed=0,
    )


def write(
    sources: Mapping[str, Checkpoint], out: Path, method: str = "linear"
) -> tuple[list[int], dict[str, Tensor]]:
    """Sizes of the batches, and the merged tensors."""
    plans = [plan_of(f"t{number:02}", size, method) for number, size in enumerate(SIZES)]
    specs = [TensorSpec(name=plan.name, dtype="bfloat16", shape=plan.shape) for plan in plans]
    steps = []
    with CheckpointWriter(out) as writer:
        with (
            writer.stream(specs, buffer_bytes=MEMORY.buffer_bytes) as stream,
            Batches(sources, stream, MEMORY) as batches,
        ):
            for plan in plans:
                steps += batches.add(plan)
            steps += batches.flush()
        writer.commit()
    return steps, load_file(out / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_tensors_of_all_sizes_are_merged_in_order(method: str, threads: int, tmp_path: Path) -> None:
    from evomerge.merge.execute import merge_tensor

    sources = models(tmp_path)
    steps, found = write(sources, tmp_path / "out", method)
    for number, size in enumerate(SIZES):
        plan = plan_of(f"t{number:02}", size, method)
        assert torch.equal(found[plan.name], merge_tensor(plan, sources))
    assert sum(steps) == 2 * sum(SIZES)
    # What fits into a buffer together goes together; parts of a large tensor go alone.
    assert steps[:3] == [2 * (3 + 100 + 200), 2 * 300, 1024]
    assert max(steps) == 1024


def test_the_first_flaw_in_order_is_named(threads: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"t04: .* as one does: element 4999 of t04"):
        write(models(tmp_path, spoilt="t04"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_thread_is_at_work_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = 0
    lock = threading.Lock()
    real = NativeTensor.write

    def slow(self: NativeTensor, out: Any, first: int = 0) -> bool:
        nonlocal busy
        with lock:
            busy += 1
        time.sleep(0.05)
        with lock:
            busy -= 1
        if self.plan.name == "t01":
            raise MemoryError
        return real(self, out, first)

    monkeypatch.setattr(NativeTensor, "write", slow)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError):
            write(models(tmp_path), tmp_path / "out")
        assert busy == 0
    finally:
        torch.set_num_threads(before)


def test_the_next_batch_is_begun_before_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    real = TensorStream.buffer

    def buffer(self: TensorStream) -> Any:
        begun.append(1)
        return real(self)

    monkeypatch.setattr(TensorStream, "buffer", buffer)
    seen = []
    put = TensorStream.put
    monkeypatch.setattr(
        TensorStream, "put", lambda self, *given: (seen.append(len(begun)), put(self, *given))[1]
    )
    steps, _ = write(models(tmp_path), tmp_path / "out")
    assert seen == [*range(2, len(steps) + 1), len(steps)]


def test_all_threads_together_hold_a_chunk_of_the_inputs(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = set()
    real = batches_module.prepare_native

    def prepare(plan: TensorPlan, sources: Any, *, piece: int) -> NativeTensor:
        pieces.add(piece)
        return real(plan, sources, piece=piece)

    monkeypatch.setattr(batches_module, "prepare_native", prepare)
    write(models(tmp_path), tmp_path / "out")
    assert pieces == {512 // threads}
