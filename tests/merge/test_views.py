"""A path of layer views computes what the exported checkpoint of its recipe does, and copies no weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merge.bank import Bank
from evomerge.merge.live import NonFiniteWeightsError
from evomerge.merge.plan import plan_merge
from evomerge.merge.views import PathModel
from evomerge.recipe import Recipe
from tests.architectures import MODELS

from .models import variant
from .paths import (
    NORMS_FROM_ONE,
    assert_close,
    assert_same,
    exported,
    make_pair,
    open_pair,
    path,
    random_hops,
    results,
    scaled_path,
)

Pair = Callable[..., Path]
HOPS = [("one", 1), ("two", 3), ("one", 1), ("two", 0), ("one", 2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Architecture and changes of its config -> folder with `one` and `two`."""
    made: dict[str, Path] = {}

    def make(name: str, **config: Any) -> Path:
        key = f"{name} {config}"
        if key not in made:
            made[key] = make_pair(tmp_path_factory.mktemp(name), name, **config)
        return made[key]

    return make


class Paths:
    """A path model over two sources."""

    def __init__(self, folder: Path, *, donor: str = "one", dtype: str = "float32") -> None:
        self.checkpoints = open_pair(folder)
        self.bank = Bank(self.checkpoints)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / donor, dtype=dtype).eval()
        self.live = PathModel(model, self.checkpoints)

    def write(self, recipe: Recipe) -> Any:
        plan = plan_merge(recipe, self.checkpoints)
        assert plan.is_path
        self.live.write(plan, self.bank)
        return self.live.model

    def places(self) -> dict[int, Tensor]:
        """Where the weights of the live model lie."""
        return {tensor.data_ptr(): tensor for tensor in self.live.model.parameters()}

    def stored(self) -> set[int]:
        """Where the stored tensors lie."""
        return {
            self.bank.tensor((model, name)).data_ptr()
            for model, checkpoint in self.checkpoints.items()
            for name in checkpoint.tensors
        }


@pytest.mark.parametrize("name", MODELS)
def test_a_path_computes_what_its_exported_checkpoint_does(name: str, pair: Pair, tmp_path: Path) -> None:
    """Whatever was written before it."""
    paths, rng = Paths(pair(name)), random.Random(name)
    offset = 1.0 if name in NORMS_FROM_ONE else 0.0
    scaled = scaled_path(random_hops(rng, 6), paths.checkpoints, rng, offset=offset)
    plain = path(random_hops(rng, 8))
    first = results(paths.write(scaled))
    assert_close(first, results(exported(scaled, paths.checkpoints, tmp_path / "scaled")))
    assert_same(results(paths.write(plain)), results(exported(plain, paths.checkpoints, tmp_path / "plain")))
    assert_same(results(paths.write(scaled)), first)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Phi3", "GPTNeoX", "Gemma3Text", "Mixtral", "Qwen3Moe"])
def test_only_vectors_are_copied_for_scales(name: str, pair: Pair) -> None:
    paths, rng = Paths(pair(name)), random.Random(name)
    paths.write(path(HOPS))
    before = paths.places()
    offset = 1.0 if name in NORMS_FROM_ONE else 0.0
    paths.write(scaled_path(HOPS, paths.checkpoints, rng, offset=offset))
    assert all(tensor.ndim == 1 for place, tensor in paths.places().items() if place not in before)
    paths.write(path(HOPS))
    assert paths.places().keys() == before.keys()


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Phi3", "GPTNeoX", "Gemma3Text"])
def test_weights_are_those_of_the_mapped_files(name: str, pair: Pair) -> None:
    paths = Paths(pair(name))
    paths.write(path(HOPS))
    assert paths.places().keys() <= paths.stored()


def test_experts_in_one_parameter_are_held_once_per_source(pair: Pair) -> None:
    paths = Paths(pair("Mixtral"))
    paths.write(path([("one", 0), ("two", 1), ("one", 0)]))
    before = paths.places()
    paths.write(path([("two", 1), ("one", 0), ("one", 0), ("two", 1)]))
    experts = {place for place, tensor in paths.places().items() if tensor.ndim == 3}
    assert len(experts) == 4  # two parameters per layer, of two layers
    assert experts <= before.keys()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "Cohere", "Mixtral", "StableLm"])
def test_every_tensor_may_have_a_factor_of_its_own(name: str, pair: Pair, tmp_path: Path) -> None:
    """Each expert too, norms of queries and keys, and matrices apart from their biases."""
    paths, rng = Paths(pair(name)), random.Random(name)
    slices = []
    for model, layer in HOPS:
        names = [
            text for text in paths.checkpoints[model].tensors if "layers" not in text or f".{layer}." in text
        ]
        settings = [{"filter": text, "value": rng.uniform(0.5, 1.5) * rng.choice([1, -1])} for text in names]
        source = {"model": model, "layer_range": [layer, layer + 1], "parameters": {"scale": settings}}
        slices.append({"sources": [source]})
    scaled = Recipe.from_dict({"merge_method": "passthrough", "dtype": "float32", "slices": slices})
    assert_close(results(paths.write(scaled)), results(exported(scaled, paths.checkpoints, tmp_path / "out")))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_some_experts_may_have_a_factor_and_others_none(name: str, pair: Pair, tmp_path: Path) -> None:
    paths = Paths(pair(name))
    writer = {"Mixtral": "experts.2.w2", "Qwen3Moe": "experts.2.down_proj"}[name]
    setting = [{"filter": writer, "value": -3.0}, {"value": 1.0}]
    source = {"model": "two", "layer_range": [0, 4], "parameters": {"scale": setting}}
    scaled = path([], slices=[{"sources": [source]}])
    assert_close(results(paths.write(scaled)), results(exported(scaled, paths.checkpoints, tmp_path / "out")))
    whole = path([("two", layer) for layer in range(4)])
    assert not torch.equal(results(paths.live.model).logits, results(paths.write(whole)).logits)


def test_scales_of_the_extension_go_to_any_tensor(pair: Pair, tmp_path: Path) -> None:
    """With an offset or without, alone or on top of mergekit's scale."""
    paths, rng = Paths(pair("Llama")), random.Random(1)
    plain = path(HOPS)
    names = [tensor.name for tensor in plan_merge(plain, paths.checkpoints).tensors]
    for offset, scale in ((0.0, None), (0.0, -0.5), (0.5, None), (0.5, -0.5)):
        scales = [{"tensor": name, "factor": rng.uniform(0.5, 1.5), "offset": offset} for name in names]
        more = {} if scale is None else {"parameters": {"scale": scale}}
        scaled = path(HOPS, evomerge={"scales": scales}, **more)
        fresh = exported(scaled, paths.checkpoints, tmp_path / f"{offset} {scale}")
        assert_close(results(paths.write(scaled)), results(fresh))


@pytest.mark.parametrize(
    ("stored", "out_dtype", "live"),
    [
        ("float32", "bfloat16", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", None, "bfloat16"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_weights_are_rounded_to_the_recipes_type_first(
    stored: str, out_dtype: str | None, live: str, tmp_path: Path
) -> None:
    folder = make_pair(tmp_path / "pair", "Llama", dtype=stored)
    paths = Paths(folder, dtype=live)
    recipe = path(HOPS, dtype="float32" if out_dtype else None, out_dtype=out_dtype)
    fresh = exported(recipe, paths.checkpoints, tmp_path / "out", dtype=live)
    found, expected = paths.write(recipe).state_dict(), fresh.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert_same(results(paths.live.model), results(fresh))


def test_two_types_in_turn_are_kept_apart(tmp_path: Path) -> None:
    paths = Paths(make_pair(tmp_path / "pair", "Llama"))
    wide, narrow = path(HOPS), path(HOPS, out_dtype="bfloat16")
    first = results(paths.write(wide))
    other = results(paths.write(narrow))
    assert not torch.equal(first.logits, other.logits)
    assert_same(results(paths.write(wide)), first)


def test_scaled_norms_are_those_of_the_checkpoint_to_the_last_bit(tmp_path: Path) -> None:
    """Gemma's too, whose factor is not that of the weight."""
    for name, offset in (("Llama", 0.0), ("Gemma2", 1.0)):
        folder = make_pair(tmp_path / name, name, dtype="bfloat16")
        paths = Paths(folder, dtype="bfloat16")
        recipe = scaled_path(HOPS, paths.checkpoints, random.Random(1), offset=offset)
        recipe = recipe.model_copy(update={"out_dtype": "bfloat16"})
        fresh = exported(recipe, paths.checkpoints, tmp_path / f"{name}-out", dtype="bfloat16")
        norms = {key: tensor for key, tensor in fresh.state_dict().items() if tensor.ndim == 1}
        found = paths.write(recipe).state_dict()
        assert len(norms) > 10
        assert all(torch.equal(found[key], norms[key]) for key in norms)


def test_a_tied_head_takes_the_scale_of_its_embedding(pair: Pair, tmp_path: Path) -> None:
    paths = Paths(pair("Gemma2"))
    recipe = path(HOPS)
    slices = recipe.to_dict()["slices"]
    slices[0]["sources"][0]["parameters"] = {
        "scale": [{"filter": "embed_tokens", "value": -1.25}, {"value": 1}]
    }
    scaled = path([], slices=slices)
    assert_close(results(paths.write(scaled)), results(exported(scaled, paths.checkpoints, tmp_path / "out")))
    assert not torch.equal(results(paths.write(recipe)).logits, results(paths.write(scaled)).logits)


def test_layers_stay_what_they_were_where_the_first_model_has_none_of_their_kind(
    tmp_path: Path,
) -> None:
    """`one` attends to everything, `two` has sliding windows, by rules that count layers."""
    for child, config in (("one", {"max_window_layers": 9}), ("two", {"max_window_layers": 2})):
        made = make_pair(tmp_path / f"for {child}", "Qwen3", **config)
        (made / child).rename(tmp_path / child)
    paths = Paths(tmp_path)
    assert not paths.live.model.model.has_sliding_layers
    for number, hops in enumerate(
        ([("one", 0), ("two", 3), ("two", 1), ("one", 2)], [("one", 1), ("one", 0)])
    ):
        recipe = path(hops)
        fresh = exported(recipe, paths.checkpoints, tmp_path / f"out{number}")
        assert_same(results(paths.write(recipe)), results(fresh))
        assert paths.live.model.config.layer_types == fresh.config.layer_types


def test_a_kind_of_layer_that_the_model_was_not_made_for_is_refused(tmp_path: Path) -> None:
    for child, pattern in (("one", 1), ("two", 2)):
        made = make_pair(tmp_path / f"for {child}", "Gemma3Text", sliding_window_pattern=pattern)
        (made / child).rename(tmp_path / child)
    with pytest.raises(CheckpointError, match="holds no layer of type sliding_attention"):
        Paths(tmp_path).write(path([("one", 0), ("two", 0)]))


def test_sources_compute_with_the_config_of_the_model(tmp_path: Path) -> None:
    """As in the checkpoint, which has one config: here the first model's."""
    folder = make_pair(tmp_path / "pair", "Llama")
    variant(folder / "two", tmp_path / "two", rms_norm_eps=0.5)
    variant(folder / "one", tmp_path / "one")
    paths = Paths(tmp_path)
    recipe = path([("one", 0), ("two", 1), ("two", 2), ("one", 2)])
    assert_same(results(paths.write(recipe)), results(exported(recipe, paths.checkpoints, tmp_path / "out")))


def test_a_source_with_layers_of_another_form_is_named_by_tensor(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / "pair", "Llama")
    wide = make_pair(tmp_path / "wide", "Llama", intermediate_size=40)

    def add_bias(state: dict[str, Tensor]) -> None:
        state["model.layers.2.self_attn.o_proj.bias"] = torch.zeros(16)

    def remove(state: dict[str, Tensor]) -> None:
        for layer in range(4):
            del state[f"model.layers.{layer}.mlp.up_proj.weight"]

    odd = {
        "merged shape [40, 16], the loaded model's is [32, 16]": wide / "two",
        "two: model.layers.2.self_attn.o_proj.bias: the loaded model has no parameter of this name": variant(
            folder / "two", tmp_path / "bias", change=add_bias
        ),
        "two: model.layers.0.mlp.up_proj.weight: no tensor of the recipe reaches this parameter": variant(
            folder / "two", tmp_path / "less", change=remove
        ),
    }
    for message, two in odd.items():
        paths = Paths(folder)
        paths.checkpoints["two"] = Checkpoint.open(two)
        with pytest.raises(CheckpointError) as caught:
            paths.write(path(HOPS))
        assert any(message in str(fault) for fault in caught.value.faults), caught.value
        paths.write(path([("one", 0)]))


def test_heads_that_the_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    untied = make_pair(tmp_path / "untied", "Llama")
    tied = make_pair(tmp_path / "tied", "Llama", tie_word_embeddings=True)
    variant(untied / "one", tmp_path / "one")
    variant(tied / "two", tmp_path / "two")
    start, end = path([("two", 0), ("one", 0)]), path([("one", 0), ("two", 0)])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: no tensor of the recipe reaches"):
        Paths(tmp_path).write(end)
    with pytest.raises(CheckpointError, match=r"ties it to \S+, but the recipe merges the two differently"):
        Paths(tmp_path, donor="two").write(start)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_spoils_only_paths_through_it(bad: float, tmp_path: Path) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["model.layers.2.mlp.up_proj.weight"][3, 4] = bad
        state["model.norm.weight"][0] = bad

    folder = make_pair(tmp_path / "pair", "Llama")
    variant(folder / "one", tmp_path / "one")
    variant(folder / "two", tmp_path / "two", change=spoil)
    paths = Paths(tmp_path)
    whole = path([("two", 1), ("two", 3), ("one", 2)])
    first = results(paths.write(whole))
    with pytest.raises(
        NonFiniteWeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*as .*layers\.2\."
    ):
        paths.write(path([("one", 0), ("two", 2), ("one", 2)]))
    with pytest.raises(NonFiniteWeightsError, match=r"model\.norm\.weight: .*NaN or infinity"):
        paths.write(path([("one", 0), ("two", 3)]))
    assert_same(results(paths.write(whole)), first)


@pytest.mark.parametrize("filtered", ["down_proj", "layernorm"])
def test_a_scale_beyond_the_range_of_the_type_is_not_finite(filtered: str, tmp_path: Path) -> None:
    """As it would not be in the checkpoint, though a multiplier would stand it."""
    paths = Paths(make_pair(tmp_path / "pair", "Llama", dtype="float16"), dtype="float16")
    source = {
        "model": "one",
        "layer_range": [0, 3],
        "parameters": {"scale": {"filter": filtered, "value": 1e6}},
    }
    recipe = path([], slices=[{"sources": [source]}], out_dtype="float16")
    with pytest.raises(NonFiniteWeightsError, match=f"{filtered}.*the merge overflowed float16"):
        paths.write(recipe)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GPT2", "Mixtral"])
def test_a_path_on_a_gpu_computes_what_it_does_on_the_cpu(name: str, pair: Pair) -> None:
    here, rng = Paths(pair(name)), random.Random(name)
    there = PathModel(
        here.live.model.__class__.from_pretrained(pair(name) / "one").cuda().eval(), here.checkpoints
    )
    offset = 1.0 if name in NORMS_FROM_ONE else 0.0
    bank = Bank(here.checkpoints, device="cuda")
    for recipe in (path(HOPS), scaled_path(HOPS, here.checkpoints, rng, offset=offset)):
        there.write(plan_merge(recipe, here.checkpoints), bank)
        assert {tensor.device.type for tensor in there.model.parameters()} == {"cuda"}
        words = torch.arange(3, 19)[None]
        with torch.no_grad():
            found, expected = there.model(words.cuda()).logits.cpu(), here.write(recipe)(words).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_finiteness_is_read_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.merge import view_sources

    paths = Paths(pair("Llama"))
    first = results(paths.write(path(HOPS)))

    def never(_: Tensor) -> float:
        raise AssertionError("read again")

    monkeypatch.setattr(view_sources, "_largest", never)
    assert_same(results(paths.write(path(HOPS))), first)


def test_sources_are_never_written_to(pair: Pair) -> None:
    folder = pair("Llama")
    paths, rng = Paths(folder), random.Random(0)
    for _ in range(3):
        results(paths.write(scaled_path(random_hops(rng, 6), paths.checkpoints, rng, offset=0.0)))
    for child, checkpoint in paths.checkpoints.items():
        stored = load_file(folder / child / "model.safetensors")
        assert all(torch.equal(checkpoint.tensor(name), stored[name]) for name in stored)
