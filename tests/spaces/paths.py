"""Models that exist only as names, for spaces over paths."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from evomerge.checkpoints.architecture import classify
from evomerge.checkpoints.decoder import find_branches, find_decoder
from evomerge.errors import ConfigurationError
from evomerge.merge.anatomy import Anatomy
from evomerge.records import Dimension, Genome, Kind
from evomerge.spaces import SearchSpace, SourceModels, build_space
from evomerge.spaces.base import ModelSize
from evomerge.spaces.path import Hop
from evomerge.spaces.steps import Pool
from evomerge.yaml_file import Document, parse_yaml

LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def anatomy(depth: int, *, tied: bool = False, norms: bool = True) -> Anatomy:
    """A Llama; without norms one whose norms have no weights."""
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    names += ["model.norm.weight"] if norms else []
    names += [
        f"model.layers.{layer}.{part}.weight"
        for layer in range(depth)
        for part in LLAMA + (NORMS if norms else ())
    ]
    roles = classify(names)
    layout: dict[int | None, dict[str, object]] = {}
    for role in roles.values():
        layout.setdefault(role.layer, {})[role.template] = role
    decoder = find_decoder(names, {"tie_word_embeddings": tied})
    return Anatomy(decoder=decoder, layers=find_branches(names), layout=layout, norm_offset=0.0)  # type: ignore[arg-type]


def sources(depths: Mapping[str, int], *, base: str | None = None, **kind: bool) -> SourceModels:
    """Models of `depths` layers; layer l of model m has 10 (m + 1) + l parameters, 100 lie outside."""
    models = {f"/zoo/{name}": depth for name, depth in depths.items()}
    return SourceModels(
        models=tuple(models),
        base=f"/zoo/{base}" if base else None,
        num_layers=next(iter(models.values())),
        dtype="bfloat16",
        depths={**models, **({f"/zoo/{base}": next(iter(models.values()))} if base else {})},
        anatomies={model: anatomy(depth, **kind) for model, depth in models.items()},
        sizes={
            model: ModelSize(layers=tuple(10 * (m + 1) + layer for layer in range(depth)), outside=100)
            for m, (model, depth) in enumerate(models.items())
        },
    )


PAIR = {"math": 4, "code": 3}


def pool(depths: Mapping[str, int] = PAIR, *, first: int = 0, last: int | None = None) -> Pool:
    counts = tuple(depths.values())
    return Pool(
        models=tuple(depths), depths=counts, first=first, last=counts[0] - 1 if last is None else last
    )


def document(text: str) -> Document:
    (found,) = parse_yaml(text, file="s.yml")
    return found


def space(text: str, of: SourceModels | None = None) -> SearchSpace:
    return build_space(document(text), of or sources(PAIR))


def faults(text: str, of: SourceModels | None = None) -> list[str]:
    try:
        space(text, of)
    except ConfigurationError as error:
        return [str(fault) for fault in error.faults]
    raise AssertionError("nothing was refused")


def start(found: SearchSpace) -> Genome:
    return tuple(dimension.start for dimension in found.dimensions)


def names(dimensions: object) -> list[str]:
    return [dimension.name for dimension in dimensions]  # type: ignore[attr-defined]


def short(hops: tuple[Hop, ...]) -> str:
    """A path in short: `math.0 code.2*0.5`."""
    texts = [f"{hop.model.removeprefix('/zoo/')}.{hop.layer}" for hop in hops]
    return " ".join(
        text + ("" if hop.scale == 1 else f"*{hop.scale:g}") for text, hop in zip(texts, hops, strict=True)
    )


def genes(dimension: Dimension) -> st.SearchStrategy[float]:
    """Any value of a dimension, its bounds often."""
    ends = st.sampled_from([dimension.low, dimension.high])
    if dimension.kind is Kind.CONTINUOUS:
        return ends | st.floats(dimension.low, dimension.high)
    return ends | st.integers(int(dimension.low), int(dimension.high)).map(float)


def genomes(found: SearchSpace) -> st.SearchStrategy[Genome]:
    return st.tuples(*(genes(dimension) for dimension in found.dimensions))
