"""The files of the data-flow model that the authors of the method released, EvoLLM-JP-v1-10B.

It is a Mistral whose layers are stored once each, and whose config calls it `evomistral`. `input_layers` and
`input_scales` say how to run it, with an entry per hop: as tensors (`model.input_layers`), or as lists in the
config. Opened here, its layers are those of an ordinary Mistral; `spaces/sakana.py` reads the path through them.

Format: https://github.com/SakanaAI/vllm/blob/evo/vllm/model_executor/models/evomistral.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.decoder import LAYER_COUNT_KEYS
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.reader import CONFIG, Checkpoint, read_header, read_json, weight_files
from evomerge.errors import CheckpointError, Fault

MODEL_TYPE = "evomistral"
LAYERS = "model.input_layers"
SCALES = "model.input_scales"

_ORDINARY: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_OWN_KEYS = ("auto_map", "num_hops", "input_layers", "input_scales")


def is_sakana(folder: Path) -> bool:
    """Whether a folder holds a model in this format."""
    return (folder / CONFIG).is_file() and read_json(folder, CONFIG).get("model_type") == MODEL_TYPE


def open_layers(folder: Path) -> Checkpoint:
    """Open the layers as an ordinary Mistral that runs each of them once; none of the folder's code is run.

    Raises:
        CheckpointError: It is in another format.
    """
    config, tensors, files = _read(folder)
    layers = {name: info for name, info in tensors.items() if name not in (LAYERS, SCALES)}
    ordinary = {key: value for key, value in config.items() if key not in _OWN_KEYS} | _ORDINARY
    ordinary |= {key: num_layers(layers) for key in LAYER_COUNT_KEYS if key in ordinary}
    return Checkpoint(folder=folder, config=ordinary, tensors=layers, files=files)


def read_steering(folder: Path) -> tuple[list[Any], list[Any]]:
    """The layer and the scale of every hop, as they stand in the files.

    Raises:
        CheckpointError: They are missing, or differ in number.
    """
    config, tensors, files = _read(folder)
    stored = Checkpoint(folder=folder, config=config, tensors=tensors, files=files)
    layers, scales = (_entries(stored, name) for name in (LAYERS, SCALES))
    hops = config.get("num_hops", len(layers))
    for name, entries in ((LAYERS, layers), (SCALES, scales)):
        if not hops or len(entries) != hops:
            raise wrong(folder, name, f"an entry for each of {hops} hops", f"{len(entries)}")
    return layers, scales


def wrong(folder: Path, where: str, expected: str, found: Any) -> CheckpointError:
    """An error of this format, to be raised."""
    return CheckpointError(Fault(path=f"{folder}: {where}", reason=f"expected {expected}, found {found}"))


def _read(folder: Path) -> tuple[dict[str, Any], Mapping[str, TensorInfo], tuple[Path, ...]]:
    config = read_json(folder, CONFIG)
    if config.get("model_type") != MODEL_TYPE:
        raise wrong(folder, f"{CONFIG}: model_type", MODEL_TYPE, config.get("model_type"))
    files = sorted(weight_files(folder))
    tensors = {name: info for file in files for name, info in read_header(folder / file).items()}
    return config, tensors, tuple(folder / file for file in files)


def _entries(stored: Checkpoint, name: str) -> list[Any]:
    listed = stored.config.get(name.removeprefix("model."))
    if isinstance(listed, list):
        return listed
    if name not in stored.tensors:
        raise wrong(stored.folder, name, "a tensor, or a list in the config, with an entry per hop", "none")
    if len(stored.tensors[name].shape) != 1:
        shape = list(stored.tensors[name].shape)
        raise wrong(stored.folder, name, "an entry per hop", f"shape {shape}")
    entries: list[Any] = stored.tensor(name).tolist()
    return entries
