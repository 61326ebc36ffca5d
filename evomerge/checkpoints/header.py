"""The header of a safetensors file, read with suspicion.

A model file comes from strangers. The stock parser accepts duplicate keys and headers of any size; this
one states the name, type, shape and place of every tensor, or says what is wrong with the file. It reads
no tensor data; `reader` does that.

Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import CheckpointError, nearest

MAX_HEADER_BYTES = 32 * 2**20
"""Headers of real shards stay below 1 MiB; the cap bounds what a hostile file can make us allocate."""

_MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class DType:
    """A number format.

    Attributes:
        name: The name in safetensors files, such as `BF16`.
        torch_name: The attribute of `torch`, such as `bfloat16`.
        itemsize: Bytes per element.
        floating: Whether it holds real floating-point numbers, so that it can be averaged.
    """

    name: str
    torch_name: str
    itemsize: int
    floating: bool


DTYPES: dict[str, DType] = {
    name: DType(name=name, torch_name=torch_name, itemsize=itemsize, floating=floating)
    for name, torch_name, itemsize, floating in (
        ("F64", "float64", 8, True),
        ("F32", "float32", 4, True),
        ("F16", "float16", 2, True),
        ("BF16", "bfloat16", 2, True),
        ("F8_E4M3", "float8_e4m3fn", 1, True),
        ("F8_E5M2", "float8_e5m2", 1, True),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, True),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, True),
        ("F8_E8M0", "float8_e8m0fnu", 1, True),
        ("C64", "complex64", 8, False),
        ("I64", "int64", 8, False),
        ("I32", "int32", 4, False),
        ("I16", "int16", 2, False),
        ("I8", "int8", 1, False),
        ("U64", "uint64", 8, False),
        ("U32", "uint32", 4, False),
        ("U16", "uint16", 2, False),
        ("U8", "uint8", 1, False),
        ("BOOL", "bool", 1, False),
    )
}
"""safetensors name -> number format."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it holds.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its safetensors type, a key of `DTYPES`.
        shape: Its sizes; empty for a scalar.
        file: The file that holds it.
        begin: Offset of its first byte, from the start of the file.
        end: Offset behind its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read which tensors a safetensors file holds, sorted by name.

    Raises:
        CheckpointError: The file cannot be read, is no safetensors file, or contradicts itself.
    """
    if file.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise CheckpointError(f"{file}: pickle weights are not loaded, as they can run code; {CONVERT}")
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = stream.read(512)
            length = _header_length(file, start, size)
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(raw) != length:
        raise CheckpointError(f"{file}: the file is truncated: its header ends early; copy it again")
    header = parse_json(raw, file, what="the header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header must be a JSON object, found {_shown(header)}")
    _check_metadata(file, header.pop("__metadata__", {}))
    offset = 8 + length
    tensors = {name: _tensor_info(file, name, header[name], offset) for name in sorted(header)}
    _check_layout(file, tensors, offset, size)
    return tensors


CONVERT = "convert the model to safetensors first"


def parse_json(data: bytes, file: Path, *, what: str = "the file") -> Any:
    """Parse UTF-8 JSON in which no object has the same key twice.

    Raises:
        CheckpointError: The text is no such JSON; the message names `file` and `what`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key in counts if counts[key] > 1)
            raise CheckpointError(f"{file}: {what} has the key {_shown(twice)} twice; it must be unique")
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {what} is not valid JSON: {error}") from error


def _header_length(file: Path, start: bytes, size: int) -> int:
    """Bytes of the header of a file of `size` bytes, given how the file starts."""
    length = int.from_bytes(start[:8], "little")
    if size < 10:
        reason = f"{size} bytes are too short for a safetensors file; copy it again"
    elif start[8:9] != b"{":
        reason = "not a safetensors file: its header does not start with '{'"
    elif length > MAX_HEADER_BYTES:
        reason = (
            f"not a safetensors file, or a hostile one: the header claims {length} bytes, "
            f"{MAX_HEADER_BYTES} are allowed"
        )
    elif length > size - 8:
        reason = f"the file is truncated: its header claims {length} bytes, {size - 8} follow; copy it again"
    else:
        return length
    raise CheckpointError(f"{file}: {_recognised(start) or reason}")


def _recognised(start: bytes) -> str:
    """What a file is that people mistake for a safetensors file, or an empty string."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the weights; run `git lfs pull` in the model's folder"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page, not a safetensors file; the download went wrong, download it again"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file, not a safetensors file; use the original checkpoint"
    # torch.save writes a zip archive; \x80 and a protocol number open an older pickle.
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"this is a pickle, which is not loaded, as it can run code; {CONVERT}"
    return ""


def _check_metadata(file: Path, metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: __metadata__ must map text to text, found {_shown(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{file}: __metadata__ must map text to text, {_shown(key)} has {_shown(value)}"
            )


def _tensor_info(file: Path, name: str, entry: object, offset: int) -> TensorInfo:
    def wrong(reason: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {_shown(name)}: {reason}")

    if not name or not name.isprintable():
        # A lone surrogate or a control character could be neither written back nor shown.
        raise wrong("the name must be printable text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong(f"expected the keys dtype, shape and data_offsets, found {_shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = nearest(dtype, DTYPES) if isinstance(dtype, str) else ""
        raise wrong(f"dtype {_shown(dtype)} is not supported{hint}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape):
        raise wrong(f"shape must be a list of numbers from 0 up, found {_shown(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets must be [begin, end] with 0 <= begin <= end, found {_shown(offsets)}")
    begin, end = offsets
    nbytes = _count(shape) * DTYPES[dtype].itemsize
    if nbytes != end - begin:
        raise wrong(f"{dtype} of shape {_shown(shape)} needs {nbytes} bytes, data_offsets give {end - begin}")
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), file=file, begin=offset + begin, end=offset + end
    )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _count(shape: Sequence[int]) -> int:
    """Number of elements; stops multiplying beyond what any file can hold."""
    count = 1
    for size in shape:
        count *= size
        if count > _MAX_ELEMENTS:
            return count
    return count


def _check_layout(file: Path, tensors: dict[str, TensorInfo], offset: int, size: int) -> None:
    """The tensors must cover the data of the file exactly once."""
    position, before = offset, ""
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        name = _shown(info.name)
        if info.begin < position:
            raise CheckpointError(f"{file}: tensor {name} overlaps tensor {_shown(before)}")
        if info.begin > position:
            raise CheckpointError(
                f"{file}: tensor {name}: {info.begin - position} unused bytes lie before it"
            )
        if info.end > size:
            raise CheckpointError(
                f"{file}: the file is truncated: tensor {name} ends at byte {info.end}, "
                f"the file at {size}; copy it again"
            )
        position, before = info.end, info.name
    if position != size:
        raise CheckpointError(f"{file}: {size - position} unused bytes follow the last tensor")


def _shown(value: object) -> str:
    """The value, shortened: a hostile header must not fill the screen."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
