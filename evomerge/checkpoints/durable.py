"""Writing files so that a crash or a power cut does not leave them half written."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

_FALLOCATE = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _FALLOCATE is not None:
    _FALLOCATE.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that after a crash it holds either the old content or the new, never a part.

    Raises:
        OSError: The file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        write_durable(temporary, data.encode("utf-8") if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable: a new or renamed file survives a power cut only after this."""
    fsync_file(path)


def write_durable(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk; a crash may leave a part."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` to an open file.

    Raises:
        OSError: It cannot be written; a part may have been.
    """
    while data:
        data = data[os.write(descriptor, data) :]


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes whose place on the disk is taken at once, where the file system can do so.

    `os.posix_fallocate` is not used: where the file system cannot, it writes the file once, byte by byte.

    Raises:
        OSError: The disk cannot hold the file, or it cannot be made.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if _FALLOCATE is not None and _FALLOCATE(descriptor, 0, 0, size) != 0:
            number = ctypes.get_errno()
            if number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
