"""SHA-256 of files, remembered between processes, as hashing tens of gigabytes takes a minute.

A remembered hash is used while real path, size, modification time and inode are those it was made with.
The memory is `hashes.json` in `$EVOMERGE_CACHE`, else in `~/.cache/evomerge`; if it cannot be read or
written, hashing is merely slower.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path

from evomerge.checkpoints.durable import write_atomic

_MAX_ENTRIES = 4096
_RACY_NS = 2 * 10**9
_HEX = re.compile(r"[0-9a-f]{64}")


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read from the file only if it is new or changed.

    Raises:
        OSError: The file cannot be read.
    """
    key = _key(path)
    known = _load().get(key)
    if known is not None:
        return known
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # A file changed just now may change again within the resolution of its time stamp.
    if _key(path) == key and time.time_ns() - path.stat().st_mtime_ns > _RACY_NS:
        _remember(key, digest)
    return digest


def _key(path: Path) -> str:
    real = path.resolve(strict=True)
    stat = real.stat()
    return json.dumps([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino])


def cache_folder() -> Path:
    """Return `$EVOMERGE_CACHE`, else `~/.cache/evomerge`.

    Raises:
        RuntimeError: There is no home.
    """
    return Path(os.environ.get("EVOMERGE_CACHE") or Path.home() / ".cache" / "evomerge")


def _file() -> Path:
    return cache_folder() / "hashes.json"


def _load() -> dict[str, str]:
    try:
        entries = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if isinstance(value, str) and _HEX.fullmatch(value)}


def _remember(key: str, digest: str) -> None:
    # Two processes may write at once; the loser's entry is hashed again some day.
    entries = {**_load(), key: digest}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_file(), json.dumps(dict(list(entries.items())[-_MAX_ENTRIES:]), indent=0))
    except (OSError, RuntimeError):
        return
