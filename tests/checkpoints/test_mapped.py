"""Mapped bytes are those of the file, cost no file handle, and are given back when told."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evomerge.checkpoints.header import DTYPES
from evomerge.checkpoints.mapped import MappedFile, read_into, stamp_of
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError

from .files import entry, model, raw

MIB = 2**20


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def large(tmp_path: Path) -> Checkpoint:
    state = {name: torch.full((8 * MIB,), number, dtype=torch.uint8) for number, name in enumerate("abcd")}
    return Checkpoint.open(model(tmp_path / "large", state))


def test_every_type_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = {
        name: (bits % 2).bool() if name == "BOOL" else bits.clone().view(getattr(torch, dtype.torch_name))
        for name, dtype in DTYPES.items()
    }
    checkpoint = Checkpoint.open(model(tmp_path / "m", state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, tensor in state.items():
            found = checkpoint.tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_tensor_at_an_odd_place_is_read_all_the_same(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    (tmp_path / "config.json").write_text("{}")
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert len(header) % 4
    raw(tmp_path / "model.safetensors", header, values.numpy().tobytes())
    found = Checkpoint.open(tmp_path).tensor("w")
    assert torch.equal(found, values)
    assert found.data_ptr() % 4 == 0


def test_writing_to_a_tensor_changes_no_file(large: Checkpoint) -> None:
    before = large.files[0].read_bytes()
    large.tensor("a").fill_(9)
    assert large.files[0].read_bytes() == before


def test_no_file_handle_is_kept(large: Checkpoint) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    kept = [large.tensor(name) for name in large.tensors]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert len(kept) == 4


def test_a_view_outlives_its_checkpoint_and_then_the_map_goes(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"a": torch.full((64,), 1.5)})
    view = Checkpoint.open(folder).tensor("a")[5:9]
    gc.collect()
    assert view.tolist() == [1.5] * 4
    assert str(folder) in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_release_gives_the_memory_back_and_the_view_stays(large: Checkpoint) -> None:
    view = large.tensor("b")
    assert int(view.sum(dtype=torch.int64)) == 8 * MIB
    assert resident(large.files[0]) >= 8 * MIB
    large.release("b")
    assert resident(large.files[0]) <= MIB // 8
    assert view[::MIB].tolist() == [1] * 8


def test_a_range_is_released_alone(large: Checkpoint) -> None:
    large.tensor("c").sum()
    large.release("c", 2 * MIB, 4 * MIB)
    # Where the system maps 2 MiB at once, it gives these back at once.
    assert 2 * MIB - MIB // 8 <= resident(large.files[0]) <= 4 * MIB + MIB // 8
    large.release("c", 6 * MIB, 99 * MIB)
    assert resident(large.files[0]) <= 2 * MIB + MIB // 8


def test_prefetch_changes_nothing_but_the_time(large: Checkpoint) -> None:
    for name in large.tensors:
        large.prefetch(name)
        large.prefetch(name, MIB, MIB)
    assert [int(large.tensor(name)[-1]) for name in large.tensors] == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="no tensor named 'x'"):
        large.prefetch("x")
    with pytest.raises(CheckpointError, match="no tensor named 'x'"):
        large.release("x")


def test_an_empty_tensor_has_nothing_to_release(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model(tmp_path / "m", {"e": torch.zeros(0, 3), "w": torch.ones(1)}))
    checkpoint.prefetch("e")
    checkpoint.release("e")
    assert checkpoint.tensor("e").shape == (0, 3)


# Files that change.


def test_a_file_truncated_after_its_first_use_is_an_error_and_no_crash(large: Checkpoint) -> None:
    large.tensor("a")
    os.truncate(large.files[0], 8 * MIB)
    for use in (large.tensor, large.prefetch, large.release):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'd' .* changed since"):
            use("d")


def test_a_file_truncated_between_opening_and_first_use_is_an_error(large: Checkpoint) -> None:
    os.truncate(large.files[0], 8 * MIB)
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        large.tensor("a")


def test_a_file_of_equal_size_put_in_its_place_before_the_first_use_is_noticed(large: Checkpoint) -> None:
    other = large.files[0].with_name("other")
    other.write_bytes(large.files[0].read_bytes())
    other.replace(large.files[0])
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        large.tensor("a")


def test_a_file_replaced_after_the_first_use_leaves_the_old_bytes(large: Checkpoint) -> None:
    large.tensor("b")
    other = large.files[0].with_name("other")
    save_file({name: torch.zeros(1) for name in "abcd"}, other)
    other.replace(large.files[0])
    assert int(large.tensor("d")[7]) == 3
    large.files[0].unlink()
    assert int(large.tensor("c")[7]) == 2


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        MappedFile(tmp_path / "none")
    raw(tmp_path / "model.safetensors", {"w": entry()}, bytes(4))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="tensor 'w' cannot be read"):
        checkpoint.tensor("w")


# Reading instead of mapping.


def test_bytes_are_read_from_any_place_even_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 5
    (tmp_path / "file").write_bytes(data)
    out = bytearray(700)
    read_into(memoryview(out), tmp_path / "file", 123)
    assert out == data[123:823]
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, begin: real(file, [parts[0][:37]], begin))
    read_into(memoryview(out), tmp_path / "file", 580)
    assert out == data[580:]
    read_into(memoryview(b""), tmp_path / "file", 99999)


def test_a_file_that_changed_or_ends_early_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    stamp = stamp_of(file.stat())
    out = memoryview(bytearray(60))
    read_into(out, file, 40, stamp)
    with pytest.raises(OSError, match="the file changed"):
        read_into(out, file, 41, stamp)
    file.write_bytes(bytes(101))
    read_into(out, file, 41)
    with pytest.raises(OSError, match="the file changed"):
        read_into(out, file, 40, stamp)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(FileNotFoundError):
        read_into(out, tmp_path / "none", 0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
