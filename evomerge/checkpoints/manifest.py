"""The manifest of a written checkpoint: size and SHA-256 of every file, so that a copy can be checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reader import contained, read_json
from evomerge.errors import CheckpointError

MANIFEST = "manifest.json"


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of all files in a folder.

    Raises:
        OSError: A file cannot be read.
    """
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in folder.iterdir()}
    return {"format": 1, "files": dict(sorted(files.items()))}


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
