"""A hash is remembered exactly as long as its file is untouched."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from evomerge.checkpoints.hashes import cached_sha256

OLD = 1_000_000_000 * 10**9


def aged(path: Path, content: bytes, mtime_ns: int = OLD) -> Path:
    """A file that looks as if written long ago."""
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_known_file_is_not_read_again(tmp_path: Path, cache: Path) -> None:
    path = aged(tmp_path / "x", b"weights")
    assert cached_sha256(path) == sha(b"weights")
    memory = cache / "hashes.json"
    memory.write_text(memory.read_text().replace(sha(b"weights"), "0" * 64))
    assert cached_sha256(path) == "0" * 64


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = aged(tmp_path / "x", b"weights")
    cached_sha256(path)
    assert cached_sha256(aged(path, b"weighty", OLD + 1)) == sha(b"weighty")  # other time
    assert cached_sha256(aged(path, b"weights!", OLD)) == sha(b"weights!")  # other size
    path.rename(tmp_path / "kept")
    assert cached_sha256(aged(path, b"weighed!", OLD)) == sha(b"weighed!")  # other inode


def test_two_links_to_a_file_share_its_hash(tmp_path: Path, cache: Path) -> None:
    path = aged(tmp_path / "x", b"weights")
    (tmp_path / "link").symlink_to(path)
    cached_sha256(path)
    cached_sha256(tmp_path / "link")
    assert len(json.loads((cache / "hashes.json").read_text())) == 1


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = aged(tmp_path / "x", b"weights")
    real = hashlib.file_digest

    def slow(stream: BinaryIO, name: str) -> Any:
        digest = real(stream, name)
        aged(path, b"changed", OLD + 1)
        return digest

    monkeypatch.setattr(hashlib, "file_digest", slow)
    assert cached_sha256(path) == sha(b"weights")
    assert not (cache / "hashes.json").exists()


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x").write_bytes(b"weights")
    assert cached_sha256(tmp_path / "x") == sha(b"weights")
    assert not (cache / "hashes.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}', "\0", "[" * 100_000])
def test_a_damaged_memory_is_ignored_and_replaced(content: str, tmp_path: Path, cache: Path) -> None:
    (cache / "hashes.json").write_text(content)
    assert cached_sha256(aged(tmp_path / "x", b"weights")) == sha(b"weights")
    assert list(json.loads((cache / "hashes.json").read_text()).values()) == [sha(b"weights")]


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(aged(tmp_path / "file", b"")))
    assert cached_sha256(aged(tmp_path / "x", b"weights")) == sha(b"weights")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cached_sha256(tmp_path / "none")
