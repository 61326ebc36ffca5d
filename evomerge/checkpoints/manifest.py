"""The manifest of a written checkpoint: size and SHA-256 of every file, so that a copy can be checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reader import contained, read_json
from evomerge.errors import CheckpointError

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file of a checkpoint is known by: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        """The record of a file that holds `data`."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def manifest_of(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    """Return the manifest of a folder with these files."""
    return {"format": 1, "files": {name: asdict(files[name]) for name in sorted(files)}}


def verify_manifest(folder: Path) -> None:
    """Check that every file listed in a folder's manifest is there, unchanged.

    Raises:
        CheckpointError: There is no usable manifest, or a file is missing or differs; names the first one.
    """
    files = read_json(folder, MANIFEST).get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{folder / MANIFEST}: 'files' must map names to their size and sha256")
    for name in sorted(files):
        path, size = contained(folder, name), files[name].get("size")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {size}; copy it again"
            )
        if _sha256(path) != files[name].get("sha256"):
            raise CheckpointError(f"{path}: its content differs from the manifest; copy it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
