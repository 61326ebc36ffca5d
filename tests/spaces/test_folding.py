"""Paths with scales, folded into plain weights, compute what transformers' modules compute hop by hop."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import ConfigurationError
from evomerge.merge.anatomy import Anatomy, anatomy_of
from evomerge.merge.check import check_recipe
from evomerge.merge.export import export_model
from evomerge.merge.load import open_models
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe, evaluate
from evomerge.spaces.folding import LARGEST, filters, path_recipe
from evomerge.spaces.path import Hop, Semantics
from tests.architectures import MODELS, SIZES, WORDS, tiny
from tests.merge.zoo import assert_same, by_mergekit, tensors

# The epsilon of norms lets them notice the size of their input, so it is next to nothing here.
RMS = {"rms_norm_eps": 1e-12}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3", "Olmo2"), RMS),
    "Mixtral": RMS,
    "Qwen3Moe": RMS,
    "GPTNeoX": {"layer_norm_eps": 1e-12},
    "GPT2": {"layer_norm_epsilon": 1e-12},
    "Cohere": {"layer_norm_eps": 1e-12},
    "StableLm": {"layer_norm_eps": 1e-12},
    "Nemotron": {"norm_eps": 1e-12},  # norms with 1 + w and a bias
    "Glm4": {**RMS, "head_dim": 8},
    "FlexOlmo": {**RMS, **EXPERTS},  # the router reads the residual stream
    "GptOss": {**RMS, **EXPERTS, "head_dim": 8},  # experts with biases, stacked in the checkpoint
}
Family = Callable[..., Path]

EVERYTHING = "one0*-1.5 one1*0.7 two1*-2 two1 one0*0.4 two0*-1.3 one2"
"""Both models, a layer twice in a row, backwards, layers left out, scales of both signs."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Architecture and changes of its config -> folder with random models `one` and `two` of it."""
    made: dict[str, Path] = {}

    def make(name: str, **config: Any) -> Path:
        key = f"{name} {config}"
        if key in made:
            return made[key]
        made[key] = tmp_path_factory.mktemp(name)
        for seed, child in enumerate(("one", "two")):
            if name in MODELS:
                model = tiny(name, **config)
            else:
                settings = getattr(transformers, f"{name}Config")(**{**SIZES, **config})
                model = getattr(transformers, f"{name}ForCausalLM")(settings)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(made[key] / child)
        return made[key]

    return make


@functools.cache
def anatomies(folder: Path) -> Mapping[str, Anatomy]:
    return {str(folder / name): anatomy_of(Checkpoint.open(folder / name)) for name in ("one", "two")}


def path(folder: Path, text: str) -> list[Hop]:
    """A path written as `one0*2 two1 one2*-0.5`: model, layer and scale."""
    hops = []
    for word in text.split():
        place, _, scale = word.partition("*")
        hops.append(Hop(model=str(folder / place[:-1]), layer=int(place[-1]), scale=float(scale or 1)))
    return hops


def folded(folder: Path, text: str, semantics: Semantics, dtype: str = "float32") -> Recipe:
    return path_recipe(path(folder, text), semantics, anatomies(folder), dtype=dtype)


def hop_by_hop(hops: Sequence[Hop], semantics: Semantics) -> Tensor:
    """The logits of a path, run with transformers' own modules; scales multiply what passes between them."""
    sources = {model: load(Path(model)) for model in {hop.model for hop in hops}}
    first, last = sources[hops[0].model], sources[hops[-1].model]
    net = copy.deepcopy(first)
    net.config.num_hidden_layers = len(hops)
    if hasattr(net.config, "layer_types"):
        net.config.layer_types = [sources[hop.model].config.layer_types[hop.layer] for hop in hops]
    body = net.base_model
    stack = "h" if hasattr(body, "h") else "layers"
    layers = nn.ModuleList(
        copy.deepcopy(getattr(sources[hop.model].base_model, stack)[hop.layer]) for hop in hops
    )
    setattr(body, stack, layers)
    for name in ("norm", "final_layer_norm", "ln_f"):
        if hasattr(body, name):
            setattr(body, name, getattr(last.base_model, name))
    if not net.config.tie_word_embeddings:
        net.set_output_embeddings(last.get_output_embeddings())
    if semantics == "stream":
        for hop, layer in zip(hops, layers, strict=True):
            layer.register_forward_pre_hook(multiply_input(hop.scale))
    else:
        for embedding in (net.get_input_embeddings(), getattr(body, "wpe", None)):
            if embedding is not None:
                embedding.register_forward_hook(multiply_output(hops[0].scale))
        for hop, layer in zip(hops[1:], layers, strict=False):
            found = [
                name for name in ("post_feedforward_layernorm", "post_mlp_layernorm") if hasattr(layer, name)
            ]
            branch = layer.get_submodule(found[0] if found else "mlp")
            branch.register_forward_hook(multiply_output(hop.scale))
    return logits(net)


def multiply_input(scale: float) -> Callable[..., Any]:
    return lambda module, given: (given[0] * scale, *given[1:])


def multiply_output(scale: float) -> Callable[..., Any]:
    def hook(module: nn.Module, given: Any, found: Any) -> Any:
        return (found[0] * scale, *found[1:]) if isinstance(found, tuple) else found * scale

    return hook


@functools.cache
def load(folder: Path) -> Any:
    """A model from a checkpoint in which transformers finds all tensors and no others; not to be changed."""
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    model, info = found
    assert not any(info.values()), info
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    words = torch.randint(3, WORDS, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(words, use_cache=False).logits
    assert found.isfinite().all()
    return found


def export(recipe: Recipe, out: Path) -> Any:
    """The exported checkpoint of a recipe, loaded afresh."""
    assert check_recipe(recipe) == []
    export_model(recipe, open_models(recipe, Path("/")), out)
    return load(out)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# What a folded path computes.


@pytest.mark.parametrize("semantics", ["branch", "stream"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_path_computes_what_its_hops_do(
    name: str, semantics: Semantics, family: Family, tmp_path: Path
) -> None:
    folder = family(name, **FAMILIES[name])
    model = export(folded(folder, EVERYTHING, semantics), tmp_path / "out")
    assert error(logits(model), hop_by_hop(path(folder, EVERYTHING), semantics)) < 3e-6


@pytest.mark.parametrize("semantics", ["branch", "stream"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "Olmo2"])
def test_so_does_any_other_path(name: str, semantics: Semantics, family: Family, tmp_path: Path) -> None:
    folder = family(name, **FAMILIES[name])
    draw = random.Random(f"{name} {semantics}")
    for number in range(3):
        hops = [
            Hop(
                model=str(folder / draw.choice(["one", "two"])),
                layer=draw.randrange(3),
                scale=draw.choice([1.0, -1.0, draw.uniform(0.5, 2), -draw.uniform(0.5, 2)]),
            )
            for _ in range(draw.randint(1, 9))
        ]
        recipe = path_recipe(hops, semantics, anatomies(folder), dtype="float32")
        model = export(recipe, tmp_path / f"{number}")
        assert error(logits(model), hop_by_hop(hops, semantics)) < 3e-6


@pytest.mark.parametrize(
    ("name", "text"), [("Llama", "one0 two1*0 one2*0"), ("GPTNeoX", "one0*0 one1*0 one2")]
)
def test_scale_0_leaves_a_branch_or_the_embedding_out(
    name: str, text: str, family: Family, tmp_path: Path
) -> None:
    folder = family(name, **FAMILIES[name])
    model = export(folded(folder, text, "branch"), tmp_path / "out")
    assert error(logits(model), hop_by_hop(path(folder, text), "branch")) < 3e-6


def test_the_norm_behind_the_embedding_takes_its_scale_and_the_tied_head_stays(tmp_path: Path) -> None:
    """BLOOM; its MLP adds to the residual stream by itself, so only what it writes can be caught."""
    config = transformers.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "one")
    hops = path(tmp_path, "one0*1.7 one1*-0.6")
    given = {str(tmp_path / "one"): anatomy_of(Checkpoint.open(tmp_path / "one"))}
    found = logits(export(path_recipe(hops, "branch", given, dtype="float32"), tmp_path / "out"))
    model.transformer.word_embeddings_layernorm.register_forward_hook(multiply_output(1.7))
    model.transformer.h[0].mlp.dense_4h_to_h.register_forward_hook(multiply_output(-0.6))
    assert error(found, logits(model)) < 3e-6


# What the recipe is.


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2"])
@pytest.mark.parametrize("semantics", ["branch", "stream"])
def test_scales_of_1_leave_no_trace(name: str, semantics: Semantics, family: Family) -> None:
    folder = family(name, **FAMILIES[name])
    recipe = folded(folder, "one0 two2 two2", semantics, dtype="bfloat16")
    assert recipe.to_dict() == {
        "slices": [
            {"sources": [{"model": str(folder / model), "layer_range": [layer, layer + 1]}]}
            for model, layer in (("one", 0), ("two", 2), ("two", 2))
        ],
        "merge_method": "passthrough",
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "evomerge": {"seed": 0},
    }
    assert plan_merge(recipe, open_models(recipe, Path("/"))).is_path
    undone = folded(folder, "one0*2 two2*0.5 two2*-1", "stream").to_dict()["slices"]
    assert "parameters" not in undone[1]["sources"][0]


def test_factors_stand_as_scales_that_mergekit_knows(family: Family) -> None:
    recipe = folded(family("Llama", **FAMILIES["Llama"]), "one0*0.5 two1*-2 one2*3", "stream").to_dict()
    scales = [piece["sources"][0]["parameters"]["scale"] for piece in recipe["slices"]]
    found = [{item["filter"]: item["value"] for item in scale} for scale in scales]
    flipped = {"input_layernorm": -1, "post_attention_layernorm": -1}
    assert found == [
        {"o_proj": 2, "down_proj": 2},
        {**flipped, "o_proj": -1, "down_proj": -1},
        {**flipped, "o_proj": -1 / 3, "down_proj": -1 / 3, "model.norm.weight": -1},
    ]
    assert recipe["evomerge"] == {"seed": 0}


def test_the_inverse_of_a_tied_embeddings_scale_goes_to_the_final_norm(family: Family) -> None:
    recipe = folded(family("GPT2", **FAMILIES["GPT2"]), "one0*4 two1", "branch").to_dict()
    scales = [piece["sources"][0]["parameters"]["scale"] for piece in recipe["slices"]]
    found = [{item["filter"]: item["value"] for item in scale} for scale in scales]
    assert found == [{"wpe": 4, "wte": 4}, {"ln_f": 0.25}]


def test_norms_that_add_1_to_their_weight_are_scaled_under_our_own_key(family: Family) -> None:
    recipe = folded(family("Gemma2", **FAMILIES["Gemma2"]), "one0*4 two1*0.5", "branch")
    assert recipe.to_dict()["evomerge"]["scales"] == [
        {"tensor": "model.layers.0.post_feedforward_layernorm.weight", "factor": 0.5, "offset": 1.0},
        {"tensor": "model.norm.weight", "factor": 0.25, "offset": 1.0},
    ]
    (first, second) = recipe.to_dict()["slices"]
    assert first["sources"][0]["parameters"] == {"scale": [{"filter": "embed_tokens", "value": 4.0}]}
    assert "parameters" not in second["sources"][0]


@pytest.mark.parametrize("semantics", ["branch", "stream"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Phi3", "Olmo2", "GPT2", "Cohere"])
def test_mergekit_makes_the_same_tensors(
    name: str, semantics: Semantics, family: Family, tmp_path: Path
) -> None:
    folder = family(name, **FAMILIES[name])
    recipe = folded(folder, EVERYTHING, semantics, dtype="bfloat16")
    assert not recipe.evomerge.scales
    export(recipe, tmp_path / "ours")
    assert_same(tensors(tmp_path / "ours"), by_mergekit(recipe, tmp_path / "theirs"), exact=True)


# Filters.


def test_filters_are_as_short_as_the_other_tensors_allow() -> None:
    names = [
        f"h.1.{name}" for name in ("attn.c_proj.weight", "mlp.c_proj.weight", "mlp.c_proj.bias", "ln.bias")
    ]
    assert filters({"h.1.mlp.c_proj.weight": 2.0, "h.1.mlp.c_proj.bias": 2.0}, names) == [
        {"filter": "mlp.c_proj", "value": 2.0}
    ]
    assert filters({"h.1.mlp.c_proj.weight": 2.0}, names) == [{"filter": "mlp.c_proj.weight", "value": 2.0}]
    assert filters(dict.fromkeys(names[:3], 2.0), names) == [{"filter": "c_proj", "value": 2.0}]


@st.composite
def names_and_factors(draw: st.DrawFn) -> tuple[list[str], dict[str, float]]:
    pieces = st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=4).map(".".join)
    names = draw(st.lists(pieces, min_size=1, max_size=8, unique=True))
    factors = draw(st.dictionaries(st.sampled_from(names), st.sampled_from([2.0, 3.0]), max_size=6))
    return names, factors


@given(names_and_factors())
def test_every_tensor_gets_its_factor_whatever_the_names(given: tuple[list[str], dict[str, float]]) -> None:
    """One name may be a part of another."""
    names, factors = given
    source = {"model": "m", "layer_range": [0, 1], "parameters": {"scale": filters(factors, names)}}
    recipe = Recipe.from_dict({"slices": [{"sources": [source]}], "merge_method": "passthrough"})
    assert recipe.slices is not None
    setting = (recipe.slices[0].sources[0].parameters or {})["scale"]
    for name in names:
        assert (evaluate(setting, tensor_name=name, depth=0, kind="float") or 1) == factors.get(name, 1)


# What is refused.


@pytest.mark.parametrize(
    ("text", "semantics", "message"),
    [
        ("", "branch", "path: expected at least one hop, got none"),
        ("three0", "branch", r"hop 0: no source model is called '.*three'"),
        ("one0 one3", "branch", r"hop 1: .*one has 3 layers, numbered from 0, got layer 3"),
        ("one0 one1*nan", "branch", "hop 1: expected its scale to lie between .* got nan"),
        ("one0*inf", "branch", "hop 0: expected its scale to lie between .* got inf"),
        ("one0 one1*1e-40", "branch", "hop 1: expected its scale to lie between"),
        ("one0 one1*nan", "stream", "hop 1: expected the product of the scales up to it to lie between"),
        ("one0 one1*0", "stream", "hop 1: expected the product of the scales up to it .* got 0.0"),
        ("one0*1e30 one1*1e30", "stream", "hop 1: expected the product of the scales up to it .* got 1.0"),
        ("one0*1e-200 one1*1e-200", "stream", "hop 0: expected the product of the scales up to it"),
    ],
)
def test_what_cannot_be_a_path_is_refused_with_its_hop(
    text: str, semantics: Semantics, message: str, family: Family
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        folded(family("Llama", **FAMILIES["Llama"]), text, semantics)


def test_products_are_refused_before_a_weight_could_overflow() -> None:
    for factor in (LARGEST, 1 / LARGEST):
        assert torch.tensor(factor, dtype=torch.float32).item() == factor
        assert torch.tensor(factor).reciprocal().item() == 1 / factor


def test_an_embedding_that_is_the_head_too_cannot_be_left_out(family: Family) -> None:
    with pytest.raises(ConfigurationError, match=r"hop 0: .* scale 0 of the embedding, which .* output head"):
        folded(family("Cohere", **FAMILIES["Cohere"]), "one0*0 one1", "branch")


def test_a_path_begins_and_ends_alike_in_tying_the_head(family: Family, tmp_path: Path) -> None:
    for name, tied in (("one", True), ("two", False)):
        tiny("Llama", tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    with pytest.raises(
        ConfigurationError, match=r"path: it begins with .*one and ends with .*two, but .*one us"
    ):
        folded(tmp_path, "one0 two1", "branch")
    folded(tmp_path, "two0 one1 two2", "branch")


def test_norms_without_weights_take_no_scales(tmp_path: Path) -> None:
    """OLMo 1: whether a norm comes before a branch cannot be told from the tensors."""
    for name in ("one", "two"):
        config = transformers.OlmoConfig(**{**SIZES, "tie_word_embeddings": True})
        transformers.OlmoForCausalLM(config).save_pretrained(tmp_path / name)
    with pytest.raises(
        ConfigurationError, match=r"hop 1: .* its attention branch, whose input norm has no w"
    ):
        folded(tmp_path, "one0 one1*2", "stream")
    with pytest.raises(ConfigurationError, match=r"hop 0: .* a scale of the embedding, as .* no final norm"):
        folded(tmp_path, "one0*2 one1", "branch")
    text = "one0 two1*-1.5 one2*0.4"
    model = export(folded(tmp_path, text, "branch"), tmp_path / "out")
    assert error(logits(model), hop_by_hop(path(tmp_path, text), "branch")) < 3e-6


def test_a_model_without_a_final_norm_takes_no_scales_of_its_stream(family: Family) -> None:
    known = anatomies(family("Llama", **FAMILIES["Llama"]))
    without = {
        name: replace(anatomy, decoder=replace(anatomy.decoder, final_norm=()))
        for name, anatomy in known.items()
    }
    hops = [Hop(model=next(iter(known)), layer=0, scale=2.0)]
    with pytest.raises(
        ConfigurationError, match=r"hop 0: .* a scale, as .*one has no final norm with weights"
    ):
        path_recipe(hops, "stream", without, dtype="float32")
