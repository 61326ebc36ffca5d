"""Weight files are written behind the computation's back, within bounded memory, and faults come to light."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints import stream as stream_module
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.stream import NUM_BUFFERS, TensorStream
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import EvomergeError


def specs(count: int = 4, size: int = 64) -> list[TensorSpec]:
    return [TensorSpec(name=f"w{n}", dtype="float32", shape=(size,)) for n in range(count)]


def write(
    out: Path,
    pieces: list[int],
    *,
    num_tensors: int | None = None,
    shard_bytes: int = 10**9,
    buffer_bytes: int = 4096,
) -> None:
    """Write tensors of 64 elements from pieces of these sizes."""
    with CheckpointWriter(out, shard_bytes=shard_bytes) as writer:
        with writer.stream(specs(num_tensors or len(pieces)), buffer_bytes=buffer_bytes) as stream:
            for size in pieces:
                stream.write(torch.ones(size))
        writer.commit()


def no_writer_thread_left() -> bool:
    return not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=600) as writer:
        with writer.stream(specs(), buffer_bytes=100) as stream:
            for number, _ in enumerate(stream.tensors):
                stream.write(torch.arange(64.0) + number)
        writer.commit()
    for file in (tmp_path / "out").glob("*.safetensors"):
        record = writer._records[file.name]
        assert record.size == file.stat().st_size
        assert record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert no_writer_thread_left()


def test_a_slow_disk_slows_the_computation_down_instead_of_filling_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Semaphore(1)  # the header of the file
    real = stream_module.write_all

    def slow(descriptor: int, data: memoryview) -> None:
        gate.acquire()
        real(descriptor, data)

    monkeypatch.setattr(stream_module, "write_all", slow)
    taken = 0
    with CheckpointWriter(tmp_path / "out") as writer, writer.stream(specs(1, 64), buffer_bytes=32) as stream:

        def compute() -> None:
            nonlocal taken
            for _ in range(8):
                buffer = stream.buffer()
                taken += 1
                stream.put(buffer, 32)

        thread = threading.Thread(target=compute)
        thread.start()
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            time.sleep(0.01)
        assert taken == NUM_BUFFERS
        for _ in range(8):
            gate.release()
        thread.join()
        assert taken == 8


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_fault_of_the_disk_ends_the_computation(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        if threading.current_thread().name == "checkpoint writer":
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)  # type: ignore[no-any-return]

    real = getattr(os, function)
    monkeypatch.setattr(os, function, broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out", [64] * 50, shard_bytes=1, buffer_bytes=16)
    assert list(tmp_path.iterdir()) == []
    assert no_writer_thread_left()


def test_a_fault_of_the_hash_ends_the_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def update(self, data: object) -> None:
            raise MemoryError

    monkeypatch.setattr(stream_module.hashlib, "sha256", lambda data: Broken())
    with pytest.raises(MemoryError):
        write(tmp_path / "out", [64])
    assert list(tmp_path.iterdir()) == []


def test_missing_and_surplus_bytes_are_noticed(tmp_path: Path) -> None:
    for size, reason in (
        (63, "4 bytes of the planned tensors are missing"),
        (65, "its tensors need 256 more"),
    ):
        with pytest.raises(ValueError, match=reason):
            write(tmp_path / "out", [size])
    assert list(tmp_path.iterdir()) == []


def test_a_piece_may_hold_several_tensors(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        with writer.stream(specs(4), buffer_bytes=3 * 256) as stream:
            for numbers in ([0.5, 1.5, 2.5], [3.5]):
                buffer = stream.buffer()
                for place, number in enumerate(numbers):
                    buffer.array(np.dtype(np.float32), 64, place * 256)[:] = number
                stream.put(buffer, len(numbers) * 256)
        writer.commit()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: set(tensor.tolist()) for name, tensor in found.items()} == {
        f"w{number}": {number + 0.5} for number in range(4)
    }


def test_a_piece_cannot_reach_into_the_next_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="256 bytes were put, its tensors need 128 more"):
        write(tmp_path / "out", [32, 64, 32], num_tensors=2, shard_bytes=256)


def compute(stream: TensorStream) -> None:
    stream.write(torch.ones(64))
    raise EvomergeError("mine")


def test_an_error_of_the_computation_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(EvomergeError, match="mine"),
        CheckpointWriter(tmp_path / "out") as writer,
        writer.stream(specs()) as stream,
    ):
        compute(stream)
    assert list(tmp_path.iterdir()) == []
    assert no_writer_thread_left()


def test_the_tensors_are_written_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        with writer.stream(specs(1)) as stream:
            stream.write(torch.ones(64))
        with pytest.raises(ValueError, match="written once"), writer.stream(specs(1)):
            pass
        with pytest.raises(ValueError, match="before `commit`"):
            writer.add("x", torch.ones(1))
