"""Writes weight files behind the back of whoever computes them.

    compute ── put ──► queue ──► thread: write | hash ──► next shard ──► fsync
       ▲                              │
       └──────── buffer ◄── free ◄────┘

The buffers are few and reused, so the memory is bounded and a slow disk slows down the computation instead of
filling it. Nothing is read back: the hash of a file is made of the bytes on their way to it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.durable import reserve, write_all
from evomerge.checkpoints.manifest import FileRecord
from evomerge.checkpoints.shards import Shard, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

NUM_BUFFERS = 3
"""One is filled, one waits, one is written."""


class Buffer:
    """Memory for a chunk of a tensor.

    Attributes:
        view: Its bytes.
    """

    def __init__(self, nbytes: int) -> None:
        # Fresh pages, which take memory only once they are filled.
        self._pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._pages)

    def tensor(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Its first `count` elements as a flat tensor."""
        import torch

        return torch.frombuffer(self._pages, dtype=dtype, count=count)

    def array(self, dtype: np.dtype[Any], count: int, offset: int = 0) -> NDArray[Any]:
        """Its `count` elements from a byte on as a flat array."""
        import numpy as np

        return np.frombuffer(self._pages, dtype, count, offset)


class TensorStream:
    """The weight files of one checkpoint while they are written; made by `CheckpointWriter.stream`.

    The bytes of all tensors of `shards` are handed over in that order, in pieces put into buffers taken with
    `buffer`; a piece may hold several tensors, but of one shard only. Errors of the thread are raised by the
    next call.

    Args:
        paths: Where the shards are written.
        shards: What they hold.
        buffer_bytes: Size of a buffer; there are `NUM_BUFFERS`.

    Attributes:
        shards: As given.

    Raises:
        OSError: The disk cannot hold the files.
    """

    def __init__(self, paths: Sequence[Path], shards: Sequence[Shard], *, buffer_bytes: int) -> None:
        self.shards = tuple(shards)
        self.buffer_bytes = buffer_bytes
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Buffer, int] | None] = queue.SimpleQueue()
        self._records: list[FileRecord] = []
        self._error: BaseException | None = None
        self._left = sum(tensor.nbytes for tensor in self.tensors)
        for path, shard in zip(paths, shards, strict=True):
            reserve(path, shard.nbytes)
        for _ in range(NUM_BUFFERS):
            self._free.put(Buffer(buffer_bytes))
        self._thread = threading.Thread(target=self._run, args=(paths, shards), name="checkpoint writer")
        self._thread.start()

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What is written, in order."""
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    def buffer(self) -> Buffer:
        """Wait for a buffer that is free; each one taken must be given to `put`."""
        self._raise()
        buffer = self._free.get()
        self._raise()
        return buffer

    def put(self, buffer: Buffer, nbytes: int) -> None:
        """Write the first `nbytes` bytes of a buffer next, and hand it back."""
        self._left -= nbytes
        self._full.put((buffer, nbytes))

    def write(self, tensor: torch.Tensor) -> None:
        """Write all bytes of a tensor, of any type and layout, next."""
        import torch

        data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        for first in range(0, data.numel(), self.buffer_bytes):
            piece = data[first : first + self.buffer_bytes]
            buffer = self.buffer()
            buffer.tensor(torch.uint8, piece.numel()).copy_(piece)
            self.put(buffer, piece.numel())

    def finish(self) -> list[FileRecord]:
        """Wait until all is on the disk; return size and hash of every shard.

        Raises:
            ValueError: Fewer or more bytes were put than the tensors have.
            OSError: A file could not be written.
        """
        if self._left:
            self.abort()
            self._raise()
            raise ValueError(f"{self._left} bytes of the planned tensors are missing")
        self._thread.join()
        self._raise()
        return self._records

    def abort(self) -> None:
        """Stop writing."""
        self._full.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, paths: Sequence[Path], shards: Sequence[Shard]) -> None:
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="checkpoint hash") as hasher:
                for path, shard in zip(paths, shards, strict=True):
                    record = self._write_shard(path, shard, hasher)
                    if record is None:
                        return
                    self._records.append(record)
        except BaseException as error:
            self._error = error
            # Whoever waits for a buffer must wake up to see the error.
            self._free.put(Buffer(self.buffer_bytes))

    def _write_shard(self, path: Path, shard: Shard, hasher: ThreadPoolExecutor) -> FileRecord | None:
        digest = hashlib.sha256(shard.header)
        left = shard.nbytes - len(shard.header)
        descriptor = os.open(path, os.O_WRONLY)
        try:
            write_all(descriptor, memoryview(shard.header))
            while left:
                item = self._full.get()
                if item is None:
                    return None
                buffer, nbytes = item
                if nbytes > left:
                    raise ValueError(f"{path.name}: {nbytes} bytes were put, its tensors need {left} more")
                hashing = hasher.submit(digest.update, buffer.view[:nbytes])
                write_all(descriptor, buffer.view[:nbytes])
                hashing.result()
                left -= nbytes
                self._free.put(buffer)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return FileRecord(size=shard.nbytes, sha256=digest.hexdigest())
