"""Small model folders for the tests of this package."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama", "num_hidden_layers": 1}


def tensors(count: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.w": torch.randn(2, 3, generator=generator) for i in range(count)}


def model(folder: Path, state: Mapping[str, torch.Tensor] | None = None, config: Any = CONFIG) -> Path:
    """A model in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors() if state is None else state), folder / "model.safetensors", {"format": "pt"})
    return folder


def sharded(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A model in several files with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file, state in shards.items():
        save_file(dict(state), folder / file)
    index(folder, {name: file for file, state in shards.items() for name in state})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def raw(file: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header: text as it is, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
