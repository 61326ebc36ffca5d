"""The tensors of one model by module and layer, as planning looks them up; found once per checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from evomerge.checkpoints.architecture import TensorRole, is_constant
from evomerge.checkpoints.decoder import Decoder, find_decoder
from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER, find_modules, shared_template
from evomerge.checkpoints.reader import Checkpoint

Layout = Mapping[int | None, Mapping[str, TensorRole]]
"""Layer, or None outside the layers -> template of the name, the same in all models -> role."""

_known: WeakKeyDictionary[Checkpoint, Mapping[str, Layout]] = WeakKeyDictionary()


def modules_of(checkpoint: Checkpoint) -> Mapping[str, Layout]:
    """Module -> its tensors that are merged: without stored copies of tied weights, and without constants.

    Raises:
        ValueError: The model cannot be understood; says what was found.
    """
    known = _known.get(checkpoint)
    if known is not None:
        return known
    dropped = tied_heads(checkpoint)
    layouts: dict[str, dict[int | None, dict[str, TensorRole]]] = {}
    for module, roles in find_modules(checkpoint.tensors).items():
        layout: dict[int | None, dict[str, TensorRole]] = layouts.setdefault(module, {})
        for role in roles.values():
            if role.name not in dropped and not is_constant(role.name, checkpoint.tensors[role.name].shape):
                layout.setdefault(role.layer, {})[shared_template(module, role.template)] = role
    _known[checkpoint] = layouts
    return layouts


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The tensors that are merged of a model that is a decoder and nothing else.

    Raises:
        ValueError: It is something else, or cannot be understood; says what was found.
    """
    find_decoder(checkpoint.tensors, checkpoint.config)
    return modules_of(checkpoint)[DEFAULT]


def decoder_of(checkpoint: Checkpoint) -> Decoder | None:
    """The language model of a model, or None if it has none by itself, as in an encoder and a decoder.

    Raises:
        ValueError: The model cannot be understood; says what was found.
    """
    modules = find_modules(checkpoint.tensors)
    if DEFAULT in modules:
        return find_decoder(checkpoint.tensors, checkpoint.config)
    if TEXT_DECODER in modules:
        return find_decoder(modules[TEXT_DECODER], checkpoint.config, alone=False)
    return None


def tied_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Output head -> embedding, for heads that a checkpoint stores although its config ties them.

    Such a head is a copy of the embedding; it is not merged, but tied again when the model is loaded.
    """
    decoder = decoder_of(checkpoint)
    if decoder is None or not decoder.tied:
        return {}
    shapes = {checkpoint.tensors[name].shape: name for name in decoder.token_embeddings}
    return {
        name: shapes[checkpoint.tensors[name].shape]
        for name in decoder.head
        if name.endswith(".weight") and checkpoint.tensors[name].shape in shapes
    }


def depth_of(layout: Layout) -> int:
    """Number of layers of a module."""
    return sum(layer is not None for layer in layout)
