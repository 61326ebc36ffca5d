"""What has to be known of a model's layers before they can be put on a path with scales.

Names and config tell the parts; how a norm uses its weight only transformers' own module tells.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.checkpoints.architecture import NORM, classify
from evomerge.checkpoints.decoder import Decoder, Layer, find_branches, find_decoder
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.layout import Layout, layout_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of one model that scales are folded into.

    Attributes:
        decoder: The parts outside its layers.
        layers: The branches of each layer.
        layout: Its tensors by layer, as merges are planned.
        norm_offset: 1 where norms multiply by (1 + w), as in Gemma, else 0.
    """

    decoder: Decoder
    layers: tuple[Layer, ...]
    layout: Layout
    norm_offset: float


def anatomy_of(checkpoint: Checkpoint) -> Anatomy:
    """Find the anatomy of a model; reads no weights.

    Raises:
        CheckpointError: The model cannot be understood; says what was found.
    """
    try:
        decoder = find_decoder(checkpoint.tensors, checkpoint.config)
        layout = layout_of(checkpoint)
        roles = [role for layer in layout.values() for role in layer.values()]
        layers = find_branches(role.name for role in roles)
    except ValueError as error:
        raise _refusal(checkpoint, str(error)) from None
    if unknown := sorted(role.template for role in roles if role.part == "other"):
        raise _refusal(checkpoint, f"cannot tell what {unknown[0]} does to the residual stream")
    if decoder.embedding_norm and not decoder.final_norm:
        reason = f"cannot tell whether {decoder.embedding_norm[0]} acts before the layers or after them"
        raise _refusal(checkpoint, reason)
    return Anatomy(decoder=decoder, layers=layers, layout=layout, norm_offset=_norm_offset(checkpoint))


def _norm_offset(checkpoint: Checkpoint) -> float:
    """What the norms of the residual stream add to their weights, found by trying one of each class."""
    norms = {type(norm).__name__: norm for norm in _stream_norms(checkpoint)}
    offsets = {name: _offset_of(norm) for name, norm in norms.items()}
    known = set(offsets.values())
    if not known <= {0.0, 1.0} or len(known) > 1:
        found = ", ".join(f"{name} adds {offset}" for name, offset in offsets.items())
        reason = f"expected norms that all multiply by their weight, or all by 1 more than it; {found}"
        raise _refusal(checkpoint, reason)
    return known.pop() if known else 0.0


def _stream_norms(checkpoint: Checkpoint) -> Iterator[Module]:
    """The modules of the norms beside the branches and outside the layers, made by transformers without memory."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # Classes of configs and models may raise anything.
        reason = f"transformers cannot build this model from its config: {type(error).__name__}: {error}"
        raise _refusal(checkpoint, reason) from None
    for role in classify(name for name, _ in model.named_parameters()).values():
        inside = role.template.partition(".{}.")[2]
        if role.part == "norm" and (role.layer is None or NORM.search(inside.split(".")[0])):
            yield model.get_submodule(role.name.rpartition(".")[0])


def _offset_of(norm: Module) -> float:
    """What a norm adds to its weight: b if it gives x (b + w) for weight w; NaN if it does otherwise."""
    import torch

    norm = copy.deepcopy(norm).to_empty(device="cpu").float()
    size = next(norm.parameters()).shape[-1]

    def given(weight: float) -> Tensor:
        for name, parameter in norm.named_parameters():
            parameter.fill_(0.0 if name == "bias" else weight)
        out: Tensor = norm(torch.linspace(-1, 2, size).unsqueeze(0))
        return out

    with torch.no_grad():
        zero, step = given(0.0), given(1.0) - given(0.0)
    for offset in (0.0, 1.0):
        if step.any() and torch.allclose(zero, offset * step, atol=1e-6):
            return offset
    return float("nan")


def _refusal(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    return CheckpointError(Fault(path=str(checkpoint.folder), reason=reason))
