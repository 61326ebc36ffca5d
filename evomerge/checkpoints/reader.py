"""A checkpoint on disk: its config, its tensors as a read-only memory map, and its content hash.

Opening reads `config.json` and the headers only. A folder from strangers is not trusted: no pickles, no
code, no file outside the folder. Names are interpreted by `architecture`, vocabularies by `tokenizer`.

    folder ── config.json ─────────────────────────────► Checkpoint.config
           ├─ model.safetensors.index.json ┐
           └─ *.safetensors ── header ─────┴─ agree? ──► Checkpoint.tensors ── mmap ──► Checkpoint.tensor
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.folder import contained, listing, read_json, what
from evomerge.checkpoints.hashes import cached_sha256
from evomerge.checkpoints.header import CONVERT, DTYPES, DType, TensorInfo, read_header
from evomerge.checkpoints.mapped import MappedFile, Stamp, read_into, stamp_of
from evomerge.errors import CheckpointError, nearest

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = [
    "CONFIG",
    "DTYPES",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "DType",
    "TensorInfo",
    "contained",
    "read_header",
    "read_json",
    "weight_files",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """One model's folder, opened for reading.

    Attributes:
        folder: Where it lies.
        config: The content of `config.json`.
        tensors: name -> where it lies, sorted by name.
        files: The weight files, sorted by name.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        files: tuple[Path, ...],
        stamps: Mapping[Path, Stamp] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = MappingProxyType(dict(sorted(tensors.items())))
        self.files = files
        self._stamps = dict(stamps or {})
        self._maps: dict[Path, MappedFile] = {}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the config and the headers of a model's folder.

        Raises:
            CheckpointError: Something about the folder cannot be used; the message names it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a model's folder, found {what(folder)}")
        config = _read_config(folder)
        files = weight_files(folder)
        stamps = {folder / name: stamp_of(contained(folder, name).stat()) for name in files}
        headers = {name: read_header(folder / name) for name in files}
        _check_index(folder, files, headers)
        tensors = {name: info for header in headers.values() for name, info in header.items()}
        if not tensors:
            raise CheckpointError(f"{folder}: the weight files hold no tensors")
        paths = tuple(folder / name for name in sorted(files))
        return cls(folder=folder, config=config, tensors=tensors, files=paths, stamps=stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.end - info.begin for info in self.tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the memory-mapped file, on the CPU; never write to it.

        The pages are read on first use and shared between all processes that map the file.

        Raises:
            CheckpointError: There is no such tensor, or its file changed since it was opened.
        """
        import torch

        info, mapped = self._mapped(name)
        dtype: torch.dtype = getattr(torch, DTYPES[info.dtype].torch_name)
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        itemsize = DTYPES[info.dtype].itemsize
        if info.begin % itemsize == 0:
            count = (info.end - info.begin) // itemsize
            return torch.frombuffer(mapped.buffer, dtype=dtype, count=count, offset=info.begin).view(
                info.shape
            )
        # Files whose header was not padded; a processor may not read numbers from odd addresses.
        odd = torch.frombuffer(
            mapped.buffer, dtype=torch.uint8, count=info.end - info.begin, offset=info.begin
        )
        return odd.clone().view(dtype).view(info.shape)

    def read(self, name: str, first: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into memory, rather than map them.

        Args:
            name: The tensor.
            first: Position of the first element.
            out: Contiguous, of the tensor's item size; as many elements as it has are read.

        Raises:
            CheckpointError: As `tensor`.
        """
        info = self._info(name)
        begin, _ = _range(info, first, None)
        try:
            read_into(out.view("uint8").data, info.file, begin, self._stamps.get(info.file))
        except OSError as error:
            raise self._unreadable(info, error) from error

    def prefetch(self, name: str, first: int = 0, count: int | None = None) -> None:
        """Have the system read a tensor, or `count` elements from `first`, in the background.

        Raises:
            CheckpointError: As `tensor`.
        """
        info, mapped = self._mapped(name)
        mapped.prefetch(*_range(info, first, count))

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        """Give back the memory that a tensor, or `count` elements from `first`, takes in this process.

        Views of it stay valid: what is touched again is read again.

        Raises:
            CheckpointError: As `tensor`.
        """
        info, mapped = self._mapped(name)
        mapped.release(*_range(info, first, count))

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: no tensor named '{name}'{nearest(name, self.tensors)}")
        return info

    def _mapped(self, name: str) -> tuple[TensorInfo, MappedFile]:
        info = self._info(name)
        try:
            mapped = self._maps.get(info.file)
            if mapped is None:
                mapped = self._maps[info.file] = MappedFile(info.file, self._stamps.get(info.file))
            mapped.check()
        except OSError as error:
            raise self._unreadable(info, error) from error
        return info, mapped

    def _unreadable(self, info: TensorInfo, error: OSError) -> CheckpointError:
        return CheckpointError(f"{info.file}: tensor '{info.name}' cannot be read: {error}")

    def content_hash(self) -> str:
        """Return the SHA-256, in hex, of the config and the weight files with their names.

        Hashes of files that did not change are remembered between processes; see `hashes`.

        Raises:
            CheckpointError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for path in (self.folder / CONFIG, *self.files):
            try:
                digest.update(f"{path.name}\0{cached_sha256(path)}\n".encode())
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {len(self.tensors)} tensors)"


def weight_files(folder: Path) -> dict[str, frozenset[str] | None]:
    """Return weight file -> names its tensors must have by the index, or None without an index.

    `model.safetensors` wins over an index, as in transformers; a single file may have any other name.

    Raises:
        CheckpointError: There are no usable weights, or the index is wrong or names a missing file.
    """
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    if (folder / INDEX).exists():
        return _read_index(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    models = [name for name in found if name != "adapter_model.safetensors"]
    if len(models) == 1:
        return {models[0]: None}
    if models:
        raise CheckpointError(f"{folder}: several weight files ({', '.join(models[:5])}) but no {INDEX}")
    if found:
        raise CheckpointError(
            f"{folder}: this is an adapter; name it behind the model it belongs to, as MODEL+{folder.name}"
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]}: pickle weights are not loaded, as they can run code; {CONVERT}"
        )
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; {listing(folder)}")


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder}: no {CONFIG}, so this is not a model; {listing(folder)}")
    config = read_json(folder, CONFIG)
    if config.get("auto_map"):
        raise CheckpointError(
            f"{folder / CONFIG}: auto_map names code in the model's folder, which is not run; if "
            "transformers knows this architecture without it, remove auto_map from a copy of the model"
        )
    return config


def _read_index(folder: Path) -> dict[str, frozenset[str] | None]:
    index = read_json(folder, INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to files")
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{folder / INDEX}: tensor '{tensor}': expected a file name, found {file!r}"
            )
        shards.setdefault(file, set()).add(tensor)
    for file in sorted(shards):
        try:
            contained(folder, file)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / INDEX}: tensor '{min(shards[file])}': {error}") from None
    return {file: frozenset(shards[file]) for file in sorted(shards)}


def _check_index(
    folder: Path,
    files: Mapping[str, frozenset[str] | None],
    headers: Mapping[str, Mapping[str, TensorInfo]],
) -> None:
    """Index and headers must name the same tensors in the same files."""
    for file, expected in files.items():
        if expected is None:
            continue
        if missing := sorted(expected - headers[file].keys()):
            raise CheckpointError(f"{folder / INDEX}: tensor '{missing[0]}' is not in {file}, which it names")
        if surplus := sorted(headers[file].keys() - expected):
            raise CheckpointError(
                f"{folder / INDEX}: {file} holds tensor '{surplus[0]}', which is not listed for that file"
            )


def _range(info: TensorInfo, first: int, count: int | None) -> tuple[int, int]:
    """Where in its file elements of a tensor begin and end."""
    itemsize = DTYPES[info.dtype].itemsize
    begin = info.begin + first * itemsize
    return begin, info.end if count is None else min(info.end, begin + count * itemsize)
