"""Writing a checkpoint so that a folder that looks complete is complete.

    stream ──► shards ──► .name.staging-pid/ ──commit──► shards named ─► index ─► manifest ─► rename

Everything goes to a staging folder beside the target; only a finished one is renamed to it. Whatever stops
the process in between leaves the target untouched, and the next writer removes the rest. The manifest
holds the hash of every file, so that a copy can be checked later. What the tensors are is left to others.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.durable import fsync_folder, write_atomic, write_durable
from evomerge.checkpoints.manifest import MANIFEST, FileRecord, manifest_of, verify_manifest
from evomerge.checkpoints.reader import INDEX
from evomerge.checkpoints.shards import Shard, TensorSpec, index_of, plan_shards
from evomerge.checkpoints.staging import StagingFolder
from evomerge.checkpoints.stream import TensorStream
from evomerge.errors import EvomergeError, RefusedError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MANIFEST",
    "CheckpointWriter",
    "TensorSpec",
    "fsync_folder",
    "refuse_if_occupied",
    "verify_manifest",
    "write_atomic",
]

BUFFER_BYTES = 4 * 2**20


class CheckpointWriter:
    """Writes one checkpoint; use as a context manager and call `commit` at the end.

    Leaving the context without `commit` removes everything written.

    Args:
        out_dir: The folder to make; it must not exist, or be empty.
        shard_bytes: A shard is closed before its tensors exceed this size; a larger tensor gets its own.

    Raises:
        RefusedError: On entering, if `out_dir` holds something or another writer is at work on it.
    """

    def __init__(self, out_dir: Path, *, shard_bytes: int = 5 * 10**9) -> None:
        self.out_dir = out_dir.resolve()
        self._shard_bytes = shard_bytes
        self._staging: StagingFolder | None = None
        self._added: dict[str, torch.Tensor] = {}
        self._shards: tuple[Shard, ...] = ()
        self._stream: TensorStream | None = None
        self._records: dict[str, FileRecord] = {}
        self._needed_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        refuse_if_occupied(self.out_dir)
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        self._staging = StagingFolder(self.out_dir)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._added.clear()
        if self._stream is not None:
            self._stream.abort()
        if self._staging is not None:
            self._staging.remove()

    @contextlib.contextmanager
    def stream(
        self, tensors: Sequence[TensorSpec], *, buffer_bytes: int = BUFFER_BYTES
    ) -> Iterator[TensorStream]:
        """Write all tensors of the checkpoint, piece by piece, in the order the stream states.

        Their place on the disk is taken before the first is written. On leaving, they are on the disk.

        Raises:
            ValueError: A tensor cannot be stored, tensors were written before, or bytes are missing.
            EvomergeError: The disk is too small or full.
        """
        if self._shards or self._added:
            raise ValueError("the tensors of a checkpoint are written once")
        self._shards = plan_shards(tensors, self._shard_bytes)
        needed, free = sum(shard.nbytes for shard in self._shards), self._free_bytes()
        self._needed_bytes += needed
        if free < needed:
            raise EvomergeError(
                f"{self.out_dir}: the checkpoint needs {needed} bytes, the disk has {free} free; "
                "free some space or choose another folder"
            )
        # Not yet *.safetensors: an unfinished folder must not open as a checkpoint.
        paths = [self._folder / f"{shard.filename}.partial" for shard in self._shards]
        with self._disk_full():
            self._stream = TensorStream(paths, self._shards, buffer_bytes=buffer_bytes)
            yield self._stream
            records = self._stream.finish()
        self._records |= {shard.filename: record for shard, record in zip(self._shards, records, strict=True)}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a whole tensor, for checkpoints that fit into memory; it is held, and written by `commit`.

        Two names may share memory; each is written in full.
        """
        if self._shards or name in self._added:
            raise ValueError(f"the name of a tensor must be new, and added before `commit`, found {name!r}")
        self._added[name] = tensor

    def add_text(self, filename: str, text: str) -> None:
        """Add a UTF-8 text file.

        Raises:
            ValueError: The name is not that of a new file in the folder.
            EvomergeError: The disk is full.
        """
        self._check_name(filename)
        self._add_bytes(filename, text.encode("utf-8"))

    def add_json(self, filename: str, obj: Any) -> None:
        """Add a JSON file; see `add_text`."""
        self.add_text(filename, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

    def copy(self, src: Path, filename: str | None = None) -> None:
        """Add a copy of a small file, under its own name unless told otherwise; see `add_text`."""
        filename = src.name if filename is None else filename
        self._check_name(filename)
        self._add_bytes(filename, src.read_bytes())

    def commit(self) -> None:
        """Finish the checkpoint and give it its name.

        Raises:
            ValueError: No tensor was written.
            RefusedError: The target came to hold something in the meantime.
            EvomergeError: The disk is full.
        """
        assert self._staging is not None, "commit is called inside the context"
        if not self._shards:
            self._write_added()
        folder = self._folder
        with self._disk_full():
            for shard in self._shards:
                (folder / f"{shard.filename}.partial").rename(folder / shard.filename)
            if len(self._shards) > 1:
                self._write(INDEX, _json_bytes(index_of(self._shards)))
            write_durable(folder / MANIFEST, _json_bytes(manifest_of(self._records)))
            fsync_folder(folder)
            try:
                folder.rename(self.out_dir)
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    refuse_if_occupied(self.out_dir)
                raise
            fsync_folder(self.out_dir.parent)
        self._staging.unlock()

    @property
    def _folder(self) -> Path:
        assert self._staging is not None, "files are added inside the context"
        return self._staging.path

    def _write_added(self) -> None:
        import torch

        specs = [
            TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
            for name, tensor in self._added.items()
        ]
        added, self._added = self._added, {}
        with self.stream(specs) as stream, torch.no_grad():
            for spec in stream.tensors:
                stream.write(added[spec.name])

    def _check_name(self, filename: str) -> None:
        if not filename or filename in {".", ".."} or "/" in filename or "\0" in filename:
            raise ValueError(f"expected the name of a file, not a path, found {filename!r}")
        taken = filename in {MANIFEST, INDEX} or filename in self._records
        if taken or Path(filename).suffix in {".safetensors", ".partial"}:
            raise ValueError(f"the file {filename!r} is written by the writer itself, or was added before")

    def _add_bytes(self, filename: str, data: bytes) -> None:
        self._needed_bytes += len(data)
        with self._disk_full():
            self._write(filename, data)

    def _write(self, filename: str, data: bytes) -> None:
        write_durable(self._folder / filename, data)
        self._records[filename] = FileRecord.of(data)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.out_dir.parent).free

    @contextlib.contextmanager
    def _disk_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise EvomergeError(
                f"{self.out_dir}: the disk is full; the checkpoint needs at least {self._needed_bytes} bytes, "
                f"{self._free_bytes()} are free; nothing was left behind: free some space or choose another "
                "folder"
            ) from error


def refuse_if_occupied(out: Path) -> None:
    """Refuse a folder to write to that holds something.

    Raises:
        RefusedError: It is not empty, or a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise RefusedError(f"{out}: the folder to write to {what}; choose another one or move it away")


def _json_bytes(obj: Any) -> bytes:
    return (json.dumps(obj, indent=2) + "\n").encode("utf-8")
