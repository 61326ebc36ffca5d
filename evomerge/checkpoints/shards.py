"""How a checkpoint's tensors are laid out in safetensors files, known before the first byte is written.

The files equal those of the safetensors library: the tensors of a shard from wide types to narrow ones, then
by name, without gaps, behind a header padded to 8 bytes; so every tensor lies at a multiple of its item size.

Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.header import DTYPES, DType
from evomerge.checkpoints.reader import SINGLE

_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that will be written.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Torch's name of its type, such as `bfloat16`.
        shape: Its sizes; empty for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def stored(self) -> DType:
        """Its number format in the file."""
        return _BY_TORCH_NAME[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One weight file.

    Attributes:
        filename: Its name in the finished checkpoint.
        tensors: What it holds, in the order of their bytes.
        header: What the file starts with.
    """

    filename: str
    tensors: tuple[TensorSpec, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[TensorSpec], shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors over files.

    Args:
        tensors: What to write; consecutive tensors share a file.
        shard_bytes: A file is closed before its tensors exceed this size; a larger tensor gets its own.

    Raises:
        ValueError: There is no tensor, a name is unusable or appears twice, or a type cannot be stored.
    """
    if not tensors:
        raise ValueError("a checkpoint needs at least one tensor")
    names: set[str] = set()
    for tensor in tensors:
        if not tensor.name or tensor.name == "__metadata__" or tensor.name in names:
            raise ValueError(f"the name of a tensor must be new and not empty, found {tensor.name!r}")
        if tensor.dtype not in _BY_TORCH_NAME:
            raise ValueError(f"tensor '{tensor.name}': safetensors files have no {tensor.dtype}")
        names.add(tensor.name)
    groups = list(_groups(tensors, shard_bytes))
    return tuple(
        Shard(
            filename=SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tensors=group,
            header=_header(group),
        )
        for number, group in enumerate(groups, start=1)
    )


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    places = {tensor.name: shard.filename for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _groups(tensors: Sequence[TensorSpec], shard_bytes: int) -> Iterator[tuple[TensorSpec, ...]]:
    group: list[TensorSpec] = []
    nbytes = 0
    for tensor in tensors:
        if group and nbytes + tensor.nbytes > shard_bytes:
            yield _sorted(group)
            group, nbytes = [], 0
        group.append(tensor)
        nbytes += tensor.nbytes
    yield _sorted(group)


def _sorted(group: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(sorted(group, key=lambda tensor: (-tensor.stored.itemsize, tensor.name)))


def _header(group: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in group:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.stored.name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
