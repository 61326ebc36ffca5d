"""Makes variations of tiny checkpoints on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def variant(
    source: Path,
    folder: Path,
    *,
    change: Callable[[dict[str, Tensor]], None] | None = None,
    remove: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Copy a checkpoint, its tensors changed by `change` and its config by `config`; None removes a key."""
    shutil.copytree(source, folder)
    if change is not None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    merged = {**json.loads((folder / "config.json").read_text()), **config}
    merged = {key: value for key, value in merged.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    for name in remove:
        (folder / name).unlink()
    return folder
