"""What a decoder is made of, found from the names of its tensors and its config.

`find_decoder` finds the parts around the layers and refuses what is not one stack of decoder layers.
`find_branches` looks into the layers. A layer has two branches, attention and MLP; each reads the residual
stream and adds to it:

    residual ──┬─ input norm ─ branch ─ writers ─ post-norm ──(+)── residual
               └───────────────────────────────────────────────┘

Either norm may be absent, and branches that run side by side may share an input norm. The words below stand
for roles, not for architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.checkpoints.architecture import NORM, TensorRole, before_layers, classify, stacks

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Where configs state the number of layers."""

BranchPart = Literal["attention", "mlp"]

_POSITION = re.compile(r"pos(itions?)?(_|$)|^wpe$", re.IGNORECASE)
_CROSS = re.compile(r"(^|\.)(cross_?attn|cross_?attention|encoder_attn)", re.IGNORECASE)
# The matrices whose results are added to the residual stream. Fused experts carry the bias in the name.
_WRITERS: dict[BranchPart, re.Pattern[str]] = {
    "attention": re.compile(r"(o|out|c)_proj|dense|wo|out|proj", re.IGNORECASE),
    "mlp": re.compile(
        r"(down_proj|dense_4h_to_h|c_proj|fc2|fc_out|w2|wo|down|output_linear)(_bias)?", re.IGNORECASE
    ),
}
# The matrices that read the residual stream where no norm comes before them.
_READERS: dict[BranchPart, re.Pattern[str]] = {
    "attention": re.compile(r"(q|k|v|qkv|gate)_proj|query_key_value|c_attn|w?qkv", re.IGNORECASE),
    "mlp": re.compile(
        r"(gate|up|gate_up)_proj|dense_h_to_4h|c_fc|fc1|fc_in|w1|w3|input_linear|gate|router|shared_expert_gate",
        re.IGNORECASE,
    ),
}
_POST_ATTENTION = re.compile(r"post_attention_")
# The place of a norm among the branches, by its name.
_NORM_PLACES: dict[tuple[BranchPart, Literal["input", "post"]], re.Pattern[str]] = {
    ("attention", "post"): re.compile(r"post_(self_)?attn"),
    ("mlp", "post"): re.compile(r"post_(feed_?forward|ffn|mlp|moe)"),
    ("mlp", "input"): re.compile(
        r"(pre_)?(feed_?forward|ffn?|mlp|moe)_?(layer_?)?norm|ln_?(2|mlp)$|norm_?2$|final_layer_norm$"
    ),
    ("attention", "input"): re.compile(
        r"input_|(pre_)?(self_)?(attn|attention|operator)_?(layer_?)?norm|ln(_?1|_?attn)?$|(layer_?)?norm_?1?$"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch of one layer; all fields hold tensor names.

    Attributes:
        input_norm: Weight and bias of the norm before it; empty if it has none, or none with weights.
        writers: Weights and biases whose result is added to the residual stream, of every expert.
        post_norm: Weight and bias of the norm between the writers and the residual stream; mostly empty.
        readers: Weights that are multiplied with the residual stream itself, where only a post-norm keeps its
            size in check, as in OLMo 2; else empty. A branch without either norm may have one without weights.
    """

    input_norm: tuple[str, ...]
    writers: tuple[str, ...]
    post_norm: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The branches of one layer; those that run side by side may share their input norm."""

    attention: Branch
    mlp: Branch


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The parts of a decoder outside its layers; all fields but the first and the last hold tensor names.

    Attributes:
        num_layers: Number of its layers.
        token_embeddings: What tokens are looked up in.
        position_embeddings: What positions are looked up in, if they are learnt.
        embedding_norm: Weight and bias of the norm between these and the first layer; mostly empty.
        final_norm: Weight and bias of the norm after the last layer; empty if it has no weights.
        head: Weight and bias of the output head; empty if only the embedding is stored.
        tied: Whether the token embedding serves as the head.
    """

    num_layers: int
    token_embeddings: tuple[str, ...]
    position_embeddings: tuple[str, ...]
    embedding_norm: tuple[str, ...]
    final_norm: tuple[str, ...]
    head: tuple[str, ...]
    tied: bool


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: the config itself, or its `text_config`."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def find_decoder(names: Iterable[str], config: Mapping[str, Any], *, alone: bool = True) -> Decoder:
    """Find the parts of a decoder.

    Args:
        names: The names of all its tensors.
        config: The content of its model's `config.json`.
        alone: Whether it is all there is; a module of a larger model may attend to others.

    Raises:
        ValueError: The model is no single stack of decoder layers, or its config tells of another one; the
            message says what was found.
    """
    names = sorted(set(names))
    roles = classify(names)
    counted = _check_stack(names, roles, alone=alone)
    text = text_config(config)
    if alone and config.get("is_encoder_decoder") is True:
        raise ValueError("expected a decoder only, but config.json says is_encoder_decoder: true")
    stated = {key: text[key] for key in LAYER_COUNT_KEYS if isinstance(text.get(key), int)}
    if stated and counted not in stated.values():
        found = ", ".join(f"{key}: {value}" for key, value in stated.items())
        raise ValueError(f"config.json says {found}, but the tensors make {counted} layers")

    outside = [role for role in roles.values() if role.layer is None]
    embeddings = [role.name for role in outside if role.part == "embedding"]
    positions = tuple(name for name in embeddings if any(map(_POSITION.search, name.split("."))))
    tokens = tuple(name for name in embeddings if name not in positions)
    if not tokens:
        raise ValueError(
            f"found no token embedding; outside the layers there are {_some([role.name for role in outside])}"
        )
    head = tuple(role.name for role in outside if role.part == "head")
    # Of a nested config, models of several modules follow the outer part.
    ties = [
        part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None
    ]
    if not head and ties and True not in ties:
        raise ValueError(
            "config.json says tie_word_embeddings: false, but found no output head; outside the layers there "
            f"are {_some([role.name for role in outside])}"
        )
    norms = [role for role in outside if role.part == "norm"]
    return Decoder(
        num_layers=counted,
        token_embeddings=tokens,
        position_embeddings=positions,
        embedding_norm=tuple(role.name for role in norms if before_layers(role)),
        final_norm=tuple(role.name for role in norms if not before_layers(role)),
        head=head,
        tied=not head or ties[:1] == [True],
    )


def find_branches(names: Iterable[str]) -> tuple[Layer, ...]:
    """Find the branches of every layer, from first to last.

    Raises:
        ValueError: The parts of some branch cannot be told; the message says what was found and expected.
    """
    by_layer: dict[int, list[TensorRole]] = {}
    for role in classify(names).values():
        if role.layer is not None:
            by_layer.setdefault(role.layer, []).append(role)
    return tuple(_layer(number, by_layer[number]) for number in range(len(by_layer)))


def is_mlp_output(name: str) -> bool:
    """Whether a tensor is one that what an MLP adds to the residual stream can be scaled by.

    Args:
        name: A tensor's name, or a part of it as the filters of recipes give one.
    """
    pieces = name.strip(".").split(".")
    if any(map(_NORM_PLACES["mlp", "post"].match, pieces)) or pieces[-1] == "mlp":
        return True
    is_attention = any("attn" in piece or "attention" in piece for piece in pieces)
    return not is_attention and any(map(_WRITERS["mlp"].fullmatch, pieces))


def _check_stack(names: Sequence[str], roles: Mapping[str, TensorRole], *, alone: bool) -> int:
    """Refuse all but one stack of layers, which attend to themselves if alone; return how many there are."""
    counted = len({role.layer for role in roles.values()} - {None})
    if not counted:
        raise ValueError(f"found no numbered layers such as 'model.layers.0'; the tensors are {_some(names)}")
    if len(found := stacks(names)) > 1:
        listed = ", ".join(f"'{name}' of {count}" for name, count in found.items())
        raise ValueError(f"expected one stack of decoder layers, found several: {listed}")
    crossed = [role.name for role in roles.values() if _CROSS.search(role.template)] if alone else []
    if crossed:
        raise ValueError(f"expected layers that attend only to themselves, found {_some(crossed)}")
    return counted


def _layer(number: int, roles: Sequence[TensorRole]) -> Layer:
    norms = _norms(number, roles)
    shared = norms.get(("attention", "input"), ())
    if ("mlp", "input") not in norms and ("mlp", "post") not in norms:
        # Branches side by side: one norm feeds both.
        norms["mlp", "input"] = shared
    branches: dict[BranchPart, Branch] = {}
    for part in _WRITERS:
        before, after = norms.get((part, "input"), ()), norms.get((part, "post"), ())
        writers = _writers(number, part, roles)
        readers = _readers(number, part, roles, writers) if after and not before else ()
        branches[part] = Branch(input_norm=before, writers=writers, post_norm=after, readers=readers)
    return Layer(attention=branches["attention"], mlp=branches["mlp"])


def _writers(number: int, part: BranchPart, roles: Sequence[TensorRole]) -> tuple[str, ...]:
    own = [role.name for role in roles if role.part == part]
    found = tuple(name for name in own if any(map(_WRITERS[part].fullmatch, name.split("."))))
    if not found:
        raise ValueError(
            f"layer {number}: expected the matrix through which its {part} branch adds to the residual "
            f"stream, such as {'o_proj or dense' if part == 'attention' else 'down_proj or fc2'}; "
            f"found {_some(own or [role.name for role in roles])}"
        )
    return found


def _readers(
    number: int, part: BranchPart, roles: Sequence[TensorRole], writers: Sequence[str]
) -> tuple[str, ...]:
    # A bias is added to what was read, whatever the size of the stream.
    weights = [role.name for role in roles if role.part == part and not role.name.endswith("bias")]
    own = [name for name in weights if name not in writers]
    found = tuple(name for name in own if any(map(_READERS[part].fullmatch, name.split("."))))
    if unknown := [name for name in own if name not in found]:
        raise ValueError(
            f"layer {number}: no norm comes before the {part} branch, and whether these read the residual "
            f"stream cannot be told: {_some(unknown)}"
        )
    return found


def _norms(
    number: int, roles: Sequence[TensorRole]
) -> dict[tuple[BranchPart, Literal["input", "post"]], tuple[str, ...]]:
    """Tell the norms between the branches; those inside one, as of queries and keys, are left out."""
    modules: dict[str, list[str]] = {}
    for role in roles:
        module = role.template.partition(".{}.")[2].split(".")[0]
        if NORM.search(module):
            modules.setdefault(module, []).append(role.name)
    places: dict[tuple[BranchPart, Literal["input", "post"]], tuple[str, ...]] = {}
    # Last the name that means one thing in Llama (the norm before the MLP) and another in Gemma and OLMo.
    for module in sorted(modules, key=lambda module: bool(_POST_ATTENTION.match(module))):
        place = next((place for place, pattern in _NORM_PLACES.items() if pattern.match(module)), None)
        if _POST_ATTENTION.match(module):
            before_mlp = ("attention", "post") in places or not (
                ("mlp", "input") in places or ("mlp", "post") in places
            )
            place = ("mlp", "input") if before_mlp else ("attention", "post")
        if place is None or place in places:
            raise ValueError(
                f"layer {number}: expected at most one norm before and one after each branch, cannot tell "
                f"the place of '{module}' among {_some(sorted(modules))}"
            )
        places[place] = tuple(modules[module])
    return places


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
