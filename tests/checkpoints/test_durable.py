"""A file is old or new, never half."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from evomerge.checkpoints.durable import write_atomic


@pytest.mark.parametrize(
    ("data", "expected"), [("grün\n", "grün\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")]
)
def test_text_and_bytes_replace_what_was_there(data: str | bytes, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old and longer")
    write_atomic(path, data)
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_durable_before_the_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "state.json", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(path, "new")
    (content, named_before), (folder, named_after) = synced
    assert content.parent == tmp_path
    assert (named_before, folder, named_after) == (False, tmp_path, True)


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "x")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
