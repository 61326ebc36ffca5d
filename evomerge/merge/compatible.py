"""Which models can be merged with each other, and which can only share a path of layers.

Merging needs the same tensors everywhere. Putting layers of several models one after the other needs layers
that compute alike and fit the same embedding and head, but not the same number of them. Only configs,
tokenizers and the headers of weight files are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from evomerge.checkpoints.decoder import LAYER_COUNT_KEYS, text_config
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.tokenizer import difference, same_vocabulary
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.config import PER_LAYER_KEYS
from evomerge.merge.layout import layout_of, tied_heads

KEYS_THAT_MAY_DIFFER = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Config entries in which models may differ without computing anything else."""

_PER_LAYER = {*LAYER_COUNT_KEYS, *PER_LAYER_KEYS}
"""Config entries that a path of layers writes anew."""

_COMPUTED_ALIKE = re.compile(
    r"^hidden_size$|head|rope|rotary|alibi|^position_embedding|position_bias|(^|_)eps|epsilon|hidden_act|activation|softcap"
    r"|parallel|_multiplier$|_scaling$"
)
"""Config entries that all layers of a model share, and that layers of several models on a path must too."""


def check_compatible(checkpoint: Checkpoint, donor: Checkpoint, donor_name: str, *, movable: bool) -> None:
    """Refuse a model that does not fit the donor, which gives the merged model its config and tokenizer.

    Args:
        checkpoint: The model.
        donor: The donor.
        donor_name: The donor as messages call it.
        movable: Whether layers are only put in another order, never merged.

    Raises:
        CheckpointError: Says in what they differ.
    """
    if fault := _no_decoder(checkpoint):
        reason = f"{fault}; a search takes plain language models, only `evomerge merge` takes others"
        raise CheckpointError(Fault(path="", reason=reason))
    if _no_decoder(donor):
        return  # told where the donor itself is checked
    for key in ("model_type", "architectures"):
        found, expected = checkpoint.config.get(key), donor.config.get(key)
        if found != expected:
            reason = f"its {key} is {found}, that of {donor_name} is {expected}; models must share one architecture"
            raise CheckpointError(Fault(path="", reason=reason))
    if movable:
        _check_layers(checkpoint, donor, donor_name)
    else:
        _check_tensors(checkpoint, donor, donor_name)
    if same_vocabulary(checkpoint.folder, donor.folder) is False:
        words = difference(checkpoint.folder, donor.folder)
        reason = (
            f"its vocabulary differs from that of {donor_name}: {words}; models must share one vocabulary"
        )
        raise CheckpointError(Fault(path="", reason=reason))


def _no_decoder(checkpoint: Checkpoint) -> str | None:
    """Why a model is no decoder and nothing else, or None if it is one."""
    try:
        layout_of(checkpoint)
    except ValueError as error:
        return str(error)
    return None


def differing_keys(checkpoint: Checkpoint, donor: Checkpoint) -> list[str]:
    """Config entries in which a model differs from the donor, if they say how something is computed."""
    keys = (set(donor.config) | set(checkpoint.config)) - KEYS_THAT_MAY_DIFFER - _PER_LAYER
    return sorted(key for key in keys if donor.config.get(key) != checkpoint.config.get(key))


def _check_tensors(checkpoint: Checkpoint, donor: Checkpoint, donor_name: str) -> None:
    ours, theirs = (set(model.tensors) - set(tied_heads(model)) for model in (checkpoint, donor))
    for name in sorted(ours ^ theirs):
        has, lacks = ("it", donor_name) if name in ours else (donor_name, "it")
        reason = f"{name}: {has} has this tensor and {lacks} has not; models must share one architecture"
        raise CheckpointError(Fault(path="", reason=reason))
    for name in sorted(ours):
        info, other = checkpoint.tensors[name], donor.tensors[name]
        if info.shape != other.shape:
            reason = f"{name}: its shape is {list(info.shape)}, in {donor_name} {list(other.shape)}"
            raise CheckpointError(Fault(path="", reason=reason))


def _check_layers(checkpoint: Checkpoint, donor: Checkpoint, donor_name: str) -> None:
    """Layers of both must fit the same stream, with the same heads, positions, norms and embedding."""
    ours, theirs = text_config(checkpoint.config), text_config(donor.config)
    # Widths and counts first: sizes that follow from them say less.
    for key in sorted(
        {*ours, *theirs} - _PER_LAYER, key=lambda key: (not key.startswith(("hid", "num")), key)
    ):
        if _COMPUTED_ALIKE.search(key) and ours.get(key) != theirs.get(key):
            reason = (
                f"config.json: its {key} is {ours.get(key)!r}, that of {donor_name} is {theirs.get(key)!r}; layers "
                "on one path must share it"
            )
            raise CheckpointError(Fault(path="", reason=reason))
    known = {shapes: number for number, shapes in _layers(donor)}
    outside = {shapes for number, shapes in _layers(donor) if number is None}
    for number, shapes in _layers(checkpoint):
        if shapes not in (outside if number is None else known):
            where = "outside its layers" if number is None else f"in its layer {number}"
            closest = next(other for n, other in _layers(donor) if (n is None) == (number is None))
            tensor, ours_there, theirs_there = _first_difference(dict(shapes), dict(closest))
            reason = (
                f"{tensor}: {where} its shape is {ours_there}, in {donor_name} it is {theirs_there}; layers on one "
                "path must share their widths"
            )
            raise CheckpointError(Fault(path="", reason=reason))


_Shapes = frozenset[tuple[str, tuple[int, ...]]]


def _layers(checkpoint: Checkpoint) -> Iterator[tuple[int | None, _Shapes]]:
    """Layer, or None outside the layers, and the shapes of its tensors by the template of their names."""
    for number, roles in sorted(
        layout_of(checkpoint).items(), key=lambda item: -1 if item[0] is None else item[0]
    ):
        yield (
            number,
            frozenset(
                (template, tuple(checkpoint.tensors[role.name].shape)) for template, role in roles.items()
            ),
        )


def _first_difference(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> tuple[str, str, str]:
    name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
    found, expected = (str(list(shapes[name])) if name in shapes else "missing" for shapes in (ours, theirs))
    return name, found, expected
