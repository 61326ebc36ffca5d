"""A safetensors header is believed only if it describes the file exactly."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from evomerge.checkpoints.header import DTYPES, MAX_HEADER_BYTES, TensorInfo, read_header
from evomerge.errors import CheckpointError

from .files import entry, raw, tensors


def test_every_tensor_is_found_with_type_shape_and_place(tmp_path: Path) -> None:
    state = {
        "b": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "a": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    file = tmp_path / "x.safetensors"
    save_file(state, file, {"format": "pt"})
    header = read_header(file)
    assert list(header) == ["a", "b", "empty"]
    assert (header["b"].dtype, header["b"].shape) == ("I64", (2, 3))
    assert (header["a"].dtype, header["a"].shape) == ("BF16", ())
    data = file.read_bytes()
    assert data[header["b"].begin : header["b"].end] == state["b"].numpy().tobytes()
    assert header["empty"].begin == header["empty"].end


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_table_of_types_agrees_with_torch_and_the_library(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, DTYPES[name].torch_name)
    assert dtype.itemsize == DTYPES[name].itemsize
    assert dtype.is_floating_point == DTYPES[name].floating
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(4, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)}, file)
    assert read_header(file)["x"].dtype == name
    with safe_open(str(file), framework="pt") as handle:
        assert handle.get_tensor("x").dtype == dtype


shapes = st.lists(st.integers(0, 4), max_size=3)


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
        st.tuples(st.sampled_from(["float32", "bfloat16", "int8", "bool"]), shapes),
        max_size=6,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_the_library_writes_is_read_as_the_library_reads_it(
    tmp_path: Path, spec: dict[str, tuple[str, list[int]]]
) -> None:
    file = tmp_path / "x.safetensors"
    save_file(
        {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in spec.items()}, file
    )
    with safe_open(str(file), framework="pt") as handle:
        expected = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        found = read_header(file)
        assert found.keys() == expected.keys()
        for name, info in found.items():
            assert info.shape == tuple(expected[name].get_shape())
            assert info.dtype == expected[name].get_dtype()


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(tensors(), whole, {"format": "pt"})
    data, part = whole.read_bytes(), tmp_path / "part.safetensors"
    for length in range(len(data)):
        part.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"part\.safetensors"):
            read_header(part)


@pytest.mark.parametrize("tail", [b"\0", b"x" * 24])
def test_bytes_behind_the_last_tensor_are_noticed(tail: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes() + tail)
    with pytest.raises(CheckpointError, match=f"{len(tail)} unused bytes follow"):
        read_header(file)


@given(position=st.integers(0, 400), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
def test_a_damaged_byte_is_refused_or_leaves_a_description_of_the_whole_file(
    tmp_path: Path, position: int, byte: int
) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file, {"format": "pt"})
    data = bytearray(file.read_bytes())
    data[position % len(data)] = byte
    file.write_bytes(data)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    places = sorted((info.begin, info.end) for info in header.values())
    assert places[-1][1] == len(data)
    assert all(before[1] == after[0] for before, after in pairwise(places))
    with safe_open(str(file), framework="pt") as handle:
        assert set(handle.keys()) == set(header)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps({"w": value}).encode()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_header_makes_the_parser_fail_in_any_other_way(tmp_path: Path, header: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        read_header(raw(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{}}', b"a", "key 'w' twice"),
        (b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"a", "key 'dtype' twice"),
        ({"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])}, bytes(6), "'b' overlaps tensor 'a'"),
        ({"a": entry(), "b": entry()}, bytes(4), "overlaps"),
        ({"a": entry(), "b": entry(offsets=[6, 10])}, bytes(10), "'b': 2 unused bytes lie before it"),
        ({"a": entry(offsets=[2, 6])}, bytes(6), "'a': 2 unused bytes"),
        ({"a": entry()}, bytes(3), "truncated: tensor 'a' ends"),
        ({"a": entry(dtype="F31")}, bytes(4), "dtype 'F31' is not supported.*did you mean 'F"),
        ({"a": entry(dtype=["F32"])}, bytes(4), "dtype .* is not supported"),
        ({"a": entry(shape=[-1])}, bytes(4), "shape must be"),
        ({"a": entry(shape=[True])}, bytes(4), "shape must be"),
        ({"a": entry(shape=[1.0])}, bytes(4), "shape must be"),
        ({"a": entry(shape=None)}, bytes(4), "shape must be"),
        ({"a": entry(shape=[2])}, bytes(4), "needs 8 bytes, data_offsets give 4"),
        ({"a": entry(shape=[2**40] * 1000)}, bytes(4), "data_offsets give 4"),
        ({"a": entry(offsets=[4, 0])}, bytes(4), "data_offsets must be"),
        ({"a": entry(offsets=[-4, 0])}, bytes(4), "data_offsets must be"),
        ({"a": entry(offsets=[0, 2, 4])}, bytes(4), "data_offsets must be"),
        ({"a": entry(offsets=["0", "4"])}, bytes(4), "data_offsets must be"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "expected the keys dtype, shape and data_offsets"),
        ({"a": {**entry(), "code": "x"}}, bytes(4), "expected the keys"),
        ({"a": 3}, b"", "expected the keys"),
        ({"": entry()}, bytes(4), "printable"),
        (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a", "printable"),
        ({"a\x1b[2J": entry()}, bytes(4), "printable"),
        ({"__metadata__": {"format": 1}, "a": entry()}, bytes(4), "__metadata__ must map text to text"),
        ({"__metadata__": "pt", "a": entry()}, bytes(4), "__metadata__ must map text to text"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
        (b'{"a":"\xff"}', b"", "not valid JSON"),
        (b"[]", b"", "does not start with '{'"),
        (b' {"a":{}}', b"", "does not start with '{'"),
        (b"{} trailing", b"", "not valid JSON"),
    ],
)
def test_a_header_that_is_wrong_is_refused_with_its_reason(
    header: Any, data: bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(raw(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_header_padded_with_spaces_is_read(tmp_path: Path) -> None:
    padded = json.dumps({"a": entry()}).encode() + b" " * 7
    assert read_header(raw(tmp_path / "x.safetensors", padded, bytes(4)))["a"].shape == (1,)


def test_a_header_bomb_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    length = MAX_HEADER_BYTES + 1
    file.write_bytes(struct.pack("<Q", length) + b"{")
    os.truncate(file, 8 + length)
    with pytest.raises(CheckpointError, match=f"claims {length} bytes, {MAX_HEADER_BYTES} are allowed"):
        read_header(file)


@pytest.mark.parametrize("length", [100, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(10))
    with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
        read_header(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "git-lfs pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n  <html><body>404</body></html>", "web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(64), "pickle.*convert"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P" + bytes(64), "pickle.*convert"),
        (b"", "0 bytes are too short"),
        (bytes(100), "not a safetensors file"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_header(file)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    # 0x0280 bytes: the file starts with b"\x80\x02", as a pickle does.
    padded = json.dumps({"a": entry()}).encode().ljust(0x0280)
    assert list(read_header(raw(tmp_path / "x.safetensors", padded, bytes(4)))) == ["a"]


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_is_refused_by_its_name(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pickle weights are not loaded"):
        read_header(tmp_path / f"pytorch_model{suffix}")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


def test_a_description_is_the_same_as_another_with_the_same_content(tmp_path: Path) -> None:
    file = raw(tmp_path / "x.safetensors", {"a": entry()}, bytes(4))
    begin = file.stat().st_size - 4
    assert read_header(file)["a"] == TensorInfo(
        name="a", dtype="F32", shape=(1,), file=file, begin=begin, end=begin + 4
    )
