"""Weight files are laid out as the safetensors library would."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from evomerge.checkpoints.reader import Checkpoint, read_header
from evomerge.checkpoints.shards import TensorSpec, index_of, plan_shards
from evomerge.checkpoints.writer import CheckpointWriter

from .files import CONFIG

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "uint8": 1}


def spec(name: str, dtype: str = "float32", *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_the_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "b": torch.randn(3, generator=generator).bfloat16(),
        'quoted "\\" name ü': torch.randn(2, 3, generator=generator),
        "a": torch.randn(1, generator=generator).double(),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "mask": torch.arange(5, dtype=torch.uint8),
    }
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.commit()
    save_file(state, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@given(
    st.lists(st.tuples(st.sampled_from(sorted(WIDTHS)), st.lists(st.integers(0, 5), max_size=3)), min_size=1),
    st.integers(1, 400),
)
def test_every_tensor_has_one_place_aligned_and_inside_its_shard(
    tensors: list[tuple[str, list[int]]], shard_bytes: int
) -> None:
    specs = [spec(f"t{n}", dtype, *shape) for n, (dtype, shape) in enumerate(tensors)]
    shards = plan_shards(specs, shard_bytes)
    assert sorted(t.name for shard in shards for t in shard.tensors) == sorted(t.name for t in specs)
    for shard in shards:
        assert len(shard.header) % 8 == 0
        offset = len(shard.header)
        for tensor in shard.tensors:
            assert offset % WIDTHS[tensor.dtype] == 0
            offset += tensor.nbytes
        assert offset == shard.nbytes
        assert len(shard.tensors) == 1 or offset - len(shard.header) <= shard_bytes
    assert index_of(shards)["metadata"]["total_size"] == sum(t.nbytes for t in specs)


def test_the_header_is_what_a_reader_finds(tmp_path: Path) -> None:
    (shard,) = plan_shards([spec("x", "float16", 2, 3), spec("y", "bool")], 100)
    (tmp_path / "f").write_bytes(shard.header + bytes(13))
    found = read_header(tmp_path / "f")
    assert (found["x"].dtype, found["x"].shape, found["x"].begin) == ("F16", (2, 3), len(shard.header))
    assert (found["y"].dtype, found["y"].shape, found["y"].end) == ("BOOL", (), shard.nbytes)


def test_a_shard_begins_where_the_next_tensor_would_not_fit() -> None:
    specs = [spec(name, "float32", 2) for name in "abcde"]
    assert [len(shard.tensors) for shard in plan_shards(specs, 16)] == [2, 2, 1]
    assert [len(shard.tensors) for shard in plan_shards(specs, 15)] == [1] * 5
    assert [len(shard.tensors) for shard in plan_shards([spec("big", "float32", 99), *specs], 16)] == [
        1,
        2,
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([], "at least one tensor"),
        ([spec("a"), spec("a")], "must be new"),
        ([spec("")], "not empty"),
        ([spec("a", "complex128")], "safetensors files have no complex128"),
    ],
)
def test_what_cannot_be_stored_is_refused(specs: list[TensorSpec], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_shards(specs, 1)


def test_mergekit_reads_what_was_written(tmp_path: Path) -> None:
    from tests import oracle  # noqa: F401  its import silences mergekit's warnings

    loader_module = importlib.import_module("mergekit.io.lazy_tensor_loader")
    state = {f"w{n}": torch.full((3,), float(n)) for n in range(4)}
    with CheckpointWriter(tmp_path / "out", shard_bytes=24) as writer:
        writer.add_json("config.json", CONFIG)
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.commit()
    loader = loader_module.LazyTensorLoader.from_disk(str(tmp_path / "out"))
    assert (
        loader.index.tensor_paths.keys() == state.keys() == Checkpoint.open(tmp_path / "out").tensors.keys()
    )
    assert all(torch.equal(loader.get_tensor(name), state[name]) for name in state)
