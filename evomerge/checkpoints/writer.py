"""Writing a checkpoint so that a folder that looks complete is complete.

    add ──► open shard ──(full)──► .name.staging-pid/ ──commit──► shards named ─► index ─► manifest ─► rename

Everything goes to a staging folder beside the target; only a finished one is renamed to it. Whatever stops
the process in between leaves the target untouched, and the next writer removes the rest. The manifest
holds the hash of every file, so that a copy can be checked later. What the tensors are is left to others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.durable import fsync_file, fsync_folder, write_atomic, write_durable
from evomerge.checkpoints.header import DTYPES
from evomerge.checkpoints.manifest import MANIFEST, manifest_of, verify_manifest
from evomerge.checkpoints.reader import INDEX, SINGLE
from evomerge.errors import EvomergeError, RefusedError

if TYPE_CHECKING:
    import torch

__all__ = ["MANIFEST", "CheckpointWriter", "fsync_folder", "verify_manifest", "write_atomic"]


class CheckpointWriter:
    """Writes one checkpoint; use as a context manager and call `commit` at the end.

    Tensors are kept until their shard is full and must not be changed before that. Leaving the context
    without `commit` removes everything written.

    Args:
        out_dir: The folder to make; it must not exist, or be empty.
        shard_bytes: A shard is written before its tensors exceed this size; a larger tensor gets its own.
        expected_bytes: Size of all tensors, to find out at the start whether the disk can hold them.

    Raises:
        RefusedError: On entering, if `out_dir` holds something or another writer is at work on it.
        EvomergeError: On entering, if the disk has less space than `expected_bytes`.
    """

    def __init__(
        self, out_dir: Path, *, shard_bytes: int = 5 * 10**9, expected_bytes: int | None = None
    ) -> None:
        self.out_dir = out_dir.resolve()
        self._shard_bytes = shard_bytes
        self._expected_bytes = expected_bytes
        self._staging = self.out_dir.parent / f".{self.out_dir.name}.staging-{os.getpid()}"
        self._lock: int | None = None
        self._open: dict[str, torch.Tensor] = {}
        self._open_bytes = 0
        self._total_bytes = 0
        self._other_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0

    def __enter__(self) -> CheckpointWriter:
        self._refuse_if_occupied()
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        free = shutil.disk_usage(self.out_dir.parent).free
        if self._expected_bytes is not None and free < self._expected_bytes:
            raise EvomergeError(
                f"{self.out_dir}: the checkpoint needs {self._expected_bytes} bytes, the disk has "
                f"{free} free; free some space or choose another folder"
            )
        self._staging.mkdir()
        self._lock = _lock(self._staging, os.getpid())
        if self._lock is None:
            raise RefusedError(f"{self.out_dir}: another process starts to write to it; try again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor. Two names may share memory; each is written in full.

        Raises:
            ValueError: The name was added before, or the dtype does not exist in safetensors files.
            EvomergeError: The disk is full.
        """
        if not name or name == "__metadata__" or name in self._shard_of:
            raise ValueError(f"the name of a tensor must be new and not empty, found {name!r}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in {known.torch_name for known in DTYPES.values()}:
            raise ValueError(f"tensor '{name}': safetensors files have no {dtype}")
        tensor = tensor.detach().to("cpu").contiguous()
        if self._open and self._open_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        if any(_overlap(tensor, other) for other in self._open.values()):
            # safetensors refuses tensors that share memory within a file.
            tensor = tensor.clone()
        self._shard_of[name] = self._num_shards
        self._open[name] = tensor
        self._open_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def add_text(self, filename: str, text: str) -> None:
        """Add a UTF-8 text file.

        Raises:
            ValueError: The name is not that of a new file in the folder.
            EvomergeError: The disk is full.
        """
        path, data = self._new_file(filename), text.encode("utf-8")
        self._other_bytes += len(data)
        with self._disk_full():
            write_durable(path, data)

    def add_json(self, filename: str, obj: Any) -> None:
        """Add a JSON file; see `add_text`."""
        self.add_text(filename, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

    def copy(self, src: Path, filename: str | None = None) -> None:
        """Add a copy of a file, under its own name unless told otherwise; see `add_text`."""
        path = self._new_file(src.name if filename is None else filename)
        self._other_bytes += src.stat().st_size
        with self._disk_full():
            shutil.copyfile(src, path)
            fsync_file(path)

    def commit(self) -> None:
        """Finish the checkpoint and give it its name.

        Raises:
            ValueError: No tensor was added.
            RefusedError: The target came to hold something in the meantime.
            EvomergeError: The disk is full.
        """
        assert self._lock is not None, "commit is called once, inside the context"
        if not self._shard_of:
            raise ValueError("a checkpoint needs at least one tensor")
        with self._disk_full():
            self._flush()
            self._name_shards()
            write_durable(self._staging / MANIFEST, _json_bytes(manifest_of(self._staging)))
            fsync_folder(self._staging)
            try:
                self._staging.rename(self.out_dir)
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    self._refuse_if_occupied()
                raise
            fsync_folder(self.out_dir.parent)
        os.close(self._lock)
        self._lock = None

    def _refuse_if_occupied(self) -> None:
        out = self.out_dir
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "is not empty" if out.is_dir() else "is a file"
            raise RefusedError(f"{out}: the folder to write to {what}; choose another one or move it away")

    def _remove_leftovers(self) -> None:
        """Remove what dead writers of the same target left; refuse if one is alive."""
        start = f".{self.out_dir.name}.staging-"
        for path in sorted(self.out_dir.parent.iterdir()):
            pid = path.name.removeprefix(start)
            if not path.name.startswith(start) or not pid.isdecimal() or not path.is_dir():
                continue
            lock = _lock(path, int(pid))
            if lock is None:
                raise RefusedError(f"{self.out_dir}: process {pid} is writing to it (in {path}); wait for it")
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    def _new_file(self, filename: str) -> Path:
        assert self._lock is not None, "files are added inside the context, before commit"
        if not filename or filename in {".", ".."} or "/" in filename or "\0" in filename:
            raise ValueError(f"expected the name of a file, not a path, found {filename!r}")
        path = self._staging / filename
        if filename in {MANIFEST, INDEX} or path.suffix in {".safetensors", ".partial"} or path.exists():
            raise ValueError(f"the file {filename!r} is written by the writer itself, or was added before")
        return path

    def _partial(self, shard: int) -> Path:
        # Not yet *.safetensors: an unfinished folder must not open as a checkpoint.
        return self._staging / f"shard-{shard + 1:05d}.partial"

    def _flush(self) -> None:
        import safetensors
        from safetensors.torch import save_file

        path = self._partial(self._num_shards)
        with self._disk_full():
            try:
                save_file(self._open, str(path), metadata={"format": "pt"})
            except safetensors.SafetensorError as error:
                # The library turns the system's error into text.
                if f"os error {errno.ENOSPC}" in str(error):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
                raise
            fsync_file(path)
        self._open = {}
        self._open_bytes = 0
        self._num_shards += 1

    def _name_shards(self) -> None:
        names = [
            f"model-{shard + 1:05d}-of-{self._num_shards:05d}.safetensors"
            for shard in range(self._num_shards)
        ]
        if self._num_shards == 1:
            names = [SINGLE]
        for shard, name in enumerate(names):
            self._partial(shard).rename(self._staging / name)
        if self._num_shards > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_durable(self._staging / INDEX, _json_bytes(index))

    @contextlib.contextmanager
    def _disk_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            needed = max(self._total_bytes, self._expected_bytes or 0) + self._other_bytes
            free = shutil.disk_usage(self.out_dir.parent).free
            raise EvomergeError(
                f"{self.out_dir}: the disk is full; the checkpoint needs at least {needed} bytes, "
                f"{free} are free; nothing was left behind: free some space or choose another folder"
            ) from error


def _lock(folder: Path, pid: int) -> int | None:
    """Lock the staging folder of process `pid`, as long as the returned descriptor is open.

    Returns None if another holder is alive. The lock tells, and not the process number, as numbers are
    used again, and differ between containers that share a disk.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever cleans up may have removed the folder between the two calls.
        if folder.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        # Some cluster file systems have no locks: the process number must do.
        if pid == os.getpid() or not _is_alive(pid):
            return descriptor
    os.close(descriptor)
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _json_bytes(obj: Any) -> bytes:
    return (json.dumps(obj, indent=2) + "\n").encode("utf-8")
