"""One controller per run directory: an exclusive `flock` on its `lock` file, held for life.

The kernel gives the lock back when the process ends, however it ends, so the lock of a dead controller
needs no recovery. The file itself stays: removing it would let two controllers lock two files of one name.
What it says (process, host, start) only serves the message to a second controller.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from evomerge.errors import EvomergeError, RunLockedError


class RunLock:
    """Keeps other controllers out of a run directory between entering and leaving.

    Attributes:
        path: The lock file.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "lock"
        self._fd: int | None = None

    def __enter__(self) -> Self:
        """Take the lock, or say at once who has it.

        Raises:
            RunLockedError: Another controller works in the run directory.
            EvomergeError: The lock file cannot be used, or its file system has no locks.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EvomergeError(f"{self.path}: cannot open the lock file: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(owner).encode() + b"\n", 0)
        except OSError as error:
            refusal = self._refusal(fd, error)
            os.close(fd)
            raise refusal from error
        self._fd = fd
        # A forked child shares the lock and would keep it beyond the controller's death.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _refusal(self, fd: int, error: OSError) -> EvomergeError:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return RunLockedError(
                f"{self.path.parent}: {_owner(fd)} works in this run directory; wait until it ends, stop "
                "it there with SIGTERM, or choose another folder (the lock of a dead process is given "
                "back by itself: nothing needs to be deleted)"
            )
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return EvomergeError(
                f"{self.path}: the file system cannot lock files ({error.strerror}), so a second "
                "controller could not be kept out; choose a run directory on another file system"
            )
        return EvomergeError(f"{self.path}: cannot take the lock: {error.strerror}")


def _owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} (since {owner['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has the lock and has not written its name yet


def is_locked(run_dir: str | Path) -> bool:
    """Tell whether a controller works in the run directory now."""
    try:
        fd = os.open(Path(run_dir) / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False
