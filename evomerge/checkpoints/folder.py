"""Files of a model's folder, read so that nothing outside it is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomerge.checkpoints.header import parse_json
from evomerge.errors import CheckpointError

_MAX_JSON_BYTES = 256 * 2**20


def contained(folder: Path, name: str) -> Path:
    """Return the file `name` of a model's folder, making sure that it does not lead out of the folder.

    In the hub's cache a snapshot's files are links to `blobs` of the same model; those are accepted.

    Raises:
        CheckpointError: The name is a path, or the file is missing or a link to somewhere else.
    """
    if not name or name in {".", ".."} or any(sign in name for sign in "/\\\0"):
        raise CheckpointError(f"{folder}: {name!r} must be the name of a file in this folder, not a path")
    path = folder / name
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {name} is missing; {listing(folder)}") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if real.parent not in allowed:
        raise CheckpointError(
            f"{path}: the link leads to {real}, outside the model's folder; copy the file instead"
        )
    if not real.is_file():
        raise CheckpointError(f"{path}: expected a file, found {what(real)}")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a model's folder.

    Raises:
        CheckpointError: The file is missing, leads out of the folder, or holds something else.
    """
    path = contained(folder, name)
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than the {_MAX_JSON_BYTES} bytes allowed")
    value = parse_json(data, path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def what(path: Path) -> str:
    """Say what lies at a path."""
    if not path.exists():
        return "nothing"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "something else"


def listing(folder: Path) -> str:
    """Say what a folder holds, shortened."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "the folder is empty"
    return f"the folder has {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
