"""What a tensor is, told from its name: the layer it belongs to and its part of the transformer.

Layers are recognised by structure, not by a table of architectures: the numbered container that holds
the most tensors (`model.layers.N`, `transformer.h.N`, `gpt_neox.layers.N`, ...) is the stack of layers.
Parts come from the pieces of the name. Shapes and values are left to others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Part = Literal["embedding", "attention", "mlp", "norm", "head", "other"]

_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
"""Matches a piece of a name that stands for a normalisation."""

_ATTENTION = re.compile(r"attn|attention|^(q|k|v|o|qkv|out)_proj$|^wqkv$|^query_key_value$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|experts?$|moe$|router"
    r"|^(gate|up|down|gate_up)_proj$|^fc(1|2|_in|_out)$|^c_fc$|^w[123]$|^dense_(h_to_4h|4h_to_h)$",
    re.IGNORECASE,
)
_EMBEDDING = re.compile(r"embed|embd|^wte$|^wpe$")
_HEAD = re.compile(r"^(lm_head|embed_out|output|output_projection|score|classifier|.*_head)$")
_CONSTANT = re.compile(r"rotary_emb\.inv_freq$|(attn|attention)\.masked_bias$")
_CAUSAL_MASK = re.compile(r"(attn|attention)\.bias$")


@dataclass(frozen=True, kw_only=True)
class TensorRole:
    """What a tensor is.

    Attributes:
        name: Its name in the checkpoint.
        layer: Number of its layer, from 0, or None outside the layers.
        template: The name with the layer number replaced by `{}`; the name itself outside the layers.
        part: Its part of the transformer. Every normalisation is `norm`, wherever it sits.
    """

    name: str
    layer: int | None
    template: str
    part: Part


def classify(names: Iterable[str], container: str | None = None) -> dict[str, TensorRole]:
    """Return name -> role, sorted by name, for all tensors of one checkpoint or of a module of it.

    Args:
        names: The names of the tensors.
        container: What holds the layers, empty if there are none; None for the container of most tensors.

    Raises:
        ValueError: The layers are not numbered 0, 1, 2, ... without a gap.
    """
    names = sorted(set(names))
    container, _ = _stack(names, container)
    roles = {}
    for name in names:
        prefix, number, rest = _split(name)
        if rest and prefix == container:
            template = f"{prefix}.{{}}.{rest}"
            roles[name] = TensorRole(name=name, layer=number, template=template, part=_part_in_layer(rest))
        else:
            roles[name] = TensorRole(name=name, layer=None, template=name, part=part_outside(name))
    return roles


def num_layers(names: Iterable[str]) -> int:
    """Return how many layers the names describe; 0 if nothing is numbered.

    Raises:
        ValueError: The layers are not numbered 0, 1, 2, ... without a gap.
    """
    return _stack(sorted(set(names)))[1]


def layer_name(template: str, layer: int) -> str:
    """Return the name of a tensor in another layer: the inverse of `TensorRole.template`."""
    # Not str.format: a name may hold other braces.
    return template.replace("{}", str(layer), 1)


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Return container -> number of its layers, for every numbered container with attention or an MLP in it.

    A decoder has one; a tower for images or sound, or an encoder, is another.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        prefix, number, rest = _split(name)
        if rest and _part_in_layer(rest) in {"attention", "mlp"}:
            numbers.setdefault(prefix, set()).add(number)
    return {prefix: len(found) for prefix, found in sorted(numbers.items())}


def is_constant(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a constant that old checkpoints store and models compute: no weight.

    Those are the frequencies of rotary embeddings and the causal masks of GPT-2 and GPT-NeoX, which are
    called `bias` but, unlike a bias, are no vectors.
    """
    return bool(_CONSTANT.search(name)) or (len(shape) > 2 and bool(_CAUSAL_MASK.search(name)))


def before_layers(role: TensorRole) -> bool:
    """Whether a tensor acts before the first layer: embeddings do, the final norm and the head do not."""
    if role.layer is not None or role.part == "head":
        return False
    # Some models normalise what the embedding gives (`word_embeddings_layernorm`).
    return role.part != "norm" or bool(_EMBEDDING.search(role.name))


def _split(name: str) -> tuple[str, int, str]:
    """Cut a name at its first number, as in `("model.layers", 3, "mlp.up_proj.weight")`.

    The rest is empty if there is no such number. Later numbers count experts and the like.
    """
    pieces = name.split(".")
    for index, piece in enumerate(pieces[:-1]):
        if index and _NUMBER.fullmatch(piece):
            return ".".join(pieces[:index]), int(piece), ".".join(pieces[index + 1 :])
    return name, 0, ""


def _stack(names: list[str], container: str | None = None) -> tuple[str, int]:
    """The container that holds most tensors, or the given one, and the number of its layers."""
    tensors: Counter[str] = Counter()
    numbers: dict[str, set[int]] = {}
    for name in names:
        prefix, number, rest = _split(name)
        if rest:
            tensors[prefix] += 1
            numbers.setdefault(prefix, set()).add(number)
    if container is None:
        container = min(tensors, key=lambda found: (-tensors[found], found), default="")
    if container not in numbers:
        return "", 0
    found = numbers[container]
    if missing := sorted(set(range(max(found) + 1)) - found):
        raise ValueError(
            f"layers must be numbered from 0 without a gap: '{container}' has {len(found)} layers "
            f"up to {max(found)}, but none numbered {', '.join(map(str, missing[:5]))}"
        )
    return container, len(found)


@lru_cache(maxsize=4096)  # the layers repeat each other
def _part_in_layer(rest: str) -> Part:
    pieces = rest.split(".")
    # Norms first: `post_attention_layernorm` and `self_attn.q_norm` name what they stand next to.
    if any(NORM.search(piece) for piece in pieces):
        return "norm"
    # Outermost first: `mlp.c_proj` and `attn.c_proj` differ only there.
    for piece in pieces:
        if _ATTENTION.search(piece):
            return "attention"
        if _MLP.search(piece):
            return "mlp"
    return "other"


def part_outside(name: str) -> Part:
    """Tell the part of a tensor outside the layers from its name."""
    pieces = name.split(".")
    if any(_HEAD.search(piece) for piece in pieces):
        return "head"
    if any(NORM.search(piece) for piece in pieces):
        return "norm"
    if any(_EMBEDDING.search(piece) for piece in pieces):
        return "embedding"
    return "other"
