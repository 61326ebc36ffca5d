"""What of a task's settings decides its scores, for the hash that a run is recorded with."""

from __future__ import annotations

import re
from typing import Any


def stable(config: Any) -> Any:
    """A task's config, functions by their source, without what differs between machines.

    That is where its files lie, and the addresses of functions whose source is not at hand.
    """
    if isinstance(config, dict):
        return {key: stable(value) for key, value in config.items() if key not in ("metadata", "data_files")}
    if isinstance(config, (list, tuple)):
        return [stable(item) for item in config]
    return re.sub(r" at 0x[0-9a-f]+", "", config) if isinstance(config, str) else config
