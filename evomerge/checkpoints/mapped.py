"""A file's bytes as memory, read when they are touched and given back when told; or read into memory at hand.

Python's own `mmap` keeps a file handle per map; a model of many shards would use them up. So the system is
called directly: the handle is closed at once, and a file larger than the memory can be mapped. The map is
private: the file cannot be changed through it.

What is left open: a file that another process shortens while its bytes are being read ends this process
(SIGBUS); that is a property of maps. The size is therefore checked before every use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

_SYSTEM = ctypes.CDLL(None, use_errno=True)
_SYSTEM.mmap.restype = ctypes.c_void_p
_SYSTEM.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_SYSTEM.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_SYSTEM.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_FAILED = ctypes.c_void_p(-1).value
# Without it, Linux refuses to map a file larger than its memory privately; `mmap` names it from Python 3.12.
_NO_RESERVE = 0x4000 if hasattr(os, "posix_fadvise") else 0
_GRAIN = max(mmap.PAGESIZE, 1 << 16)
"""Bytes; a page fault maps the pages around it as well, up to this many on Linux."""

CHANGED = "the file changed since the checkpoint was opened; start again"

Stamp = tuple[int, int, int, int]


def stamp_of(stat: os.stat_result) -> Stamp:
    """Device, inode, size and time of the last change: what tells a file from another one."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class MappedFile:
    """The bytes of a file.

    Args:
        path: The file.
        stamp: What `stamp_of` must give, or None for whatever is there.

    Attributes:
        buffer: The bytes, as an object with Python's buffer protocol; they stay mapped while it is used.

    Raises:
        OSError: The file cannot be mapped, or is not the one described by `stamp`.
    """

    def __init__(self, path: Path, stamp: Stamp | None = None) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self._stamp = stamp_of(os.fstat(descriptor))
            if stamp is not None and stamp != self._stamp:
                raise OSError(CHANGED)
            self.size = self._stamp[2]
            self.buffer = _map(descriptor, self.size, path)
        finally:
            os.close(descriptor)
        self._address = ctypes.addressof(self.buffer)

    def check(self) -> None:
        """Make sure that the mapped bytes still exist.

        A file that was replaced by another one of its name is no danger: the map keeps the old one.

        Raises:
            OSError: The file was shortened.
        """
        try:
            device, inode, size, _ = stamp_of(self.path.stat())
        except OSError:
            return
        if (device, inode) == self._stamp[:2] and size < self.size:
            raise OSError(CHANGED)

    def prefetch(self, begin: int, end: int) -> None:
        """Ask the system to read bytes `begin` to `end` in the background."""
        self._advise(begin, end, mmap.MADV_WILLNEED)

    def release(self, begin: int, end: int) -> None:
        """Give back the memory of bytes `begin` to `end`; they are read again if they are touched again."""
        self._advise(begin, end, mmap.MADV_DONTNEED)

    def _advise(self, begin: int, end: int, advice: int) -> None:
        first = begin // _GRAIN * _GRAIN
        last = min(-(-end // _GRAIN) * _GRAIN, self.size)
        if begin < end:
            # It is advice: nothing depends on whether the system takes it.
            _SYSTEM.madvise(self._address + first, last - first, advice)


def read_into(out: memoryview, path: Path, begin: int, stamp: Stamp | None = None) -> None:
    """Fill memory with the bytes of a file.

    What is read once is read faster so than through a map, whose pages are entered and dropped one by one while
    other threads wait; and a file that is shortened meanwhile is an error like any other.

    Args:
        out: Bytes; written.
        path: The file.
        begin: Where its bytes start.
        stamp: As for `MappedFile`.

    Raises:
        OSError: The file cannot be read, is not the one described by `stamp`, or ends too early.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if stamp is not None and stamp != stamp_of(os.fstat(descriptor)):
            raise OSError(CHANGED)
        while out:
            count = os.preadv(descriptor, [out], begin)
            if not count:
                raise OSError(CHANGED)
            out, begin = out[count:], begin + count
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int, path: Path) -> Any:
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _NO_RESERVE
    address = _SYSTEM.mmap(None, size, protection, flags, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    buffer = (ctypes.c_uint8 * size).from_address(address)
    # At the end of the process the system unmaps; other threads may still read.
    weakref.finalize(buffer, _SYSTEM.munmap, address, size).atexit = False
    return buffer
