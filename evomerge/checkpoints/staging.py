"""Folders that a process works in until they get their final name, and what dead processes left of them.

Such a folder is called `.<target>.<kind>-<process number>` and lies beside its target.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from evomerge.errors import RefusedError


class StagingFolder:
    """A folder that is removed unless it was renamed, and locked as long as it is in use.

    Args:
        target: What it is made for.
        kind: What it is for, to keep several of one target apart.

    Attributes:
        path: The folder.

    Raises:
        RefusedError: Another process has one for the same target.
    """

    def __init__(self, target: Path, kind: str = "staging") -> None:
        self._target = target
        self._start = f".{target.name}.{kind}-"
        self.path = target.parent / f"{self._start}{os.getpid()}"
        self._remove_leftovers()
        self.path.mkdir()
        self._lock = _lock(self.path, os.getpid())
        if self._lock is None:
            raise RefusedError(f"{target}: another process starts to write to it; try again")

    def unlock(self) -> None:
        """Keep the folder, which has its final name now."""
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None

    def remove(self) -> None:
        """Remove the folder unless it was unlocked."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.unlock()

    def _remove_leftovers(self) -> None:
        """Remove what dead processes left for the same target; refuse if one is alive."""
        for path in sorted(self._target.parent.iterdir()):
            pid = path.name.removeprefix(self._start)
            if not path.name.startswith(self._start) or not pid.isdecimal() or not path.is_dir():
                continue
            lock = _lock(path, int(pid))
            if lock is None:
                raise RefusedError(f"{self._target}: process {pid} is writing to it (in {path}); wait for it")
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


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
