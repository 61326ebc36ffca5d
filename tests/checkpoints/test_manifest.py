"""A copy of a checkpoint is checked file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints.manifest import MANIFEST, verify_manifest
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError

from .files import CONFIG, tensors


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add_json("config.json", CONFIG)
        for name, tensor in tensors().items():
            writer.add(name, tensor)
        writer.commit()
    return tmp_path / "out"


def test_an_untouched_checkpoint_is_verified(written: Path) -> None:
    verify_manifest(written)
    manifest = json.loads((written / MANIFEST).read_text())
    assert list(manifest["files"]) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_changed_byte_is_noticed_and_the_file_named(name: str, written: Path) -> None:
    path = written / name
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match=f"{name}: its content differs from the manifest"):
            verify_manifest(written)
    path.write_bytes(data[:-1])
    with pytest.raises(
        CheckpointError, match=f"{name}: {len(data) - 1} bytes, the manifest says {len(data)}"
    ):
        verify_manifest(written)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify_manifest(written)


def test_the_first_file_that_differs_is_named(written: Path) -> None:
    (written / "config.json").unlink()
    (written / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        verify_manifest(written)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": []}', '{"files": {"x": 3}}'])
def test_a_damaged_manifest_is_an_error(manifest: str, written: Path) -> None:
    (written / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_manifest(written)


def test_a_missing_manifest_is_an_error(written: Path) -> None:
    (written / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        verify_manifest(written)


@pytest.mark.parametrize("entry", [{}, {"size": None, "sha256": None}])
def test_an_entry_without_size_or_hash_verifies_nothing(entry: Any, written: Path) -> None:
    (written / MANIFEST).write_text(json.dumps({"files": {"config.json": entry}}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify_manifest(written)


def test_a_manifest_cannot_point_outside_its_folder(written: Path) -> None:
    (written / MANIFEST).write_text(json.dumps({"files": {"../secret": {"size": 1, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="must be the name of a file in this folder"):
        verify_manifest(written)
