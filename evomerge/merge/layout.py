"""The tensors of one model by layer, as planning looks them up; found once per checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from evomerge.checkpoints.architecture import TensorRole, classify, is_constant
from evomerge.checkpoints.decoder import find_decoder
from evomerge.checkpoints.reader import Checkpoint

Layout = Mapping[int | None, Mapping[str, TensorRole]]
"""Layer, or None outside the layers -> template of the name -> role."""

_layouts: WeakKeyDictionary[Checkpoint, Layout] = WeakKeyDictionary()


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The tensors that are merged: without stored copies of tied weights, and without constants.

    Raises:
        ValueError: The model cannot be understood; says what was found.
    """
    known = _layouts.get(checkpoint)
    if known is not None:
        return known
    dropped = tied_heads(checkpoint)
    layout: dict[int | None, dict[str, TensorRole]] = {}
    for role in classify(checkpoint.tensors).values():
        if role.name not in dropped and not is_constant(role.name, checkpoint.tensors[role.name].shape):
            layout.setdefault(role.layer, {})[role.template] = role
    _layouts[checkpoint] = layout
    return layout


def tied_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Output head -> embedding, for heads that a checkpoint stores although its config ties them.

    Such a head is a copy of the embedding; it is not merged, but tied again when the model is loaded.
    """
    decoder = find_decoder(checkpoint.tensors, checkpoint.config)
    if not decoder.tied:
        return {}
    shapes = {checkpoint.tensors[name].shape: name for name in decoder.token_embeddings}
    return {
        name: shapes[checkpoint.tensors[name].shape]
        for name in decoder.head
        if name.endswith(".weight") and checkpoint.tensors[name].shape in shapes
    }
