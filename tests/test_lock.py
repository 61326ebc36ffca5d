"""One controller works in a run directory, and a dead one is not in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import evomerge
from evomerge.errors import EvomergeError, RunLockedError
from evomerge.lock import RunLock

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}

HOLD = """
import sys, time
from evomerge.lock import RunLock

with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""

HOLD_WITH_CHILD = """
import os, subprocess, sys, time
from evomerge.lock import RunLock

with RunLock(sys.argv[1]):
    if sys.argv[2] == "fork":
        if not os.fork():
            print(os.getpid(), flush=True)  # by the child, so that it is known to be up
            time.sleep(60)
            os._exit(0)
    else:
        print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def controller(program: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    with process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_second_controller_is_refused_by_process_and_host_until_the_first_ends(tmp_path: Path) -> None:
    with controller(HOLD, tmp_path) as (process, line):
        assert line == "held"
        with pytest.raises(RunLockedError) as caught, RunLock(tmp_path):
            pass
        message = str(caught.value)
        assert f"process {process.pid} on {socket.gethostname()}" in message
        assert str(tmp_path) in message
        assert "SIGTERM" in message
        process.communicate("\n", timeout=10)
        assert process.returncode == 0
        with RunLock(tmp_path):
            pass


def test_the_lock_of_a_killed_controller_is_free(tmp_path: Path) -> None:
    with controller(HOLD, tmp_path) as (process, line):
        assert line == "held"
        process.kill()
        process.wait(timeout=10)
        with RunLock(tmp_path) as lock:
            assert json.loads(lock.path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("way", ["fork", "exec"])
def test_a_child_that_outlives_a_killed_controller_does_not_hold_its_lock(tmp_path: Path, way: str) -> None:
    with controller(HOLD_WITH_CHILD, tmp_path, way) as (process, line):
        child = int(line)
        try:
            with pytest.raises(RunLockedError, match=f"process {process.pid} "), RunLock(tmp_path):
                pass
            process.kill()
            process.wait(timeout=10)
            os.kill(child, 0)
            with RunLock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_one_process_cannot_enter_twice_and_leaving_frees_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} "), RunLock(tmp_path):
            pass
        with pytest.raises(RunLockedError), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_an_owner_that_has_not_written_its_name_yet_is_still_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        for text in ("", '{"pid": 1', "[]", '{"pid": 1}'):
            lock.path.write_text(text)
            with pytest.raises(RunLockedError, match="another process works in this run directory"):
                RunLock(tmp_path).__enter__()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(EvomergeError, match=rf"cannot lock files \({os.strerror(code)}\)"):
        RunLock(tmp_path).__enter__()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="gone/lock: cannot open the lock file: No such file"):
        RunLock(tmp_path / "gone").__enter__()


def test_refused_attempts_leave_no_file_open(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            with pytest.raises(RunLockedError):
                RunLock(tmp_path).__enter__()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
