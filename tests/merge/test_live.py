"""A live model holds exactly the weights of the last recipe written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merge.export import export_model
from evomerge.merge.live import LiveModel, NonFiniteWeightsError
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe

from .models import variant
from .paths import assert_same, exported, make_pair, open_pair, results
from .test_plan import copy_embedding, two, untie
from .zoo import merged, models, recipe

A = "models: [{model: $one}, {model: $two}]\nmerge_method: linear\nparameters: {weight: 1}\n"
B = """
models: [{model: $one, parameters: {weight: 0.4}}, {model: $three, parameters: {weight: 0.9}}]
merge_method: dare_ties
base_model: $base
parameters: {density: 0.6}
"""


def live(folder: Path) -> LiveModel:
    return LiveModel(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def write(target: LiveModel, wanted: Recipe) -> None:
    sources = models(wanted)
    target.write(plan_merge(wanted, sources), sources)


def state(target: LiveModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in target.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(16)[None]).logits
    return found


def test_every_tensor_is_overwritten_and_nothing_of_another_candidate_stays(tiny_zoo: Path) -> None:
    target = live(tiny_zoo / "base")
    a, b = recipe(A, tiny_zoo), recipe(B, tiny_zoo)
    target.poison()
    assert all(tensor.isnan().all() for tensor in state(target).values())
    write(target, a)
    first = state(target)
    assert same(first, merged(a))
    target.poison()
    write(target, b)
    assert same(state(target), merged(b))
    assert not same(state(target), first)
    write(target, a)
    assert same(state(target), first)


def test_parameters_are_never_reallocated(tiny_zoo: Path) -> None:
    target = live(tiny_zoo / "base")
    before = [parameter.data_ptr() for parameter in target.model.parameters()]
    write(target, recipe(A, tiny_zoo))
    assert [parameter.data_ptr() for parameter in target.model.parameters()] == before


def test_a_live_model_computes_what_the_exported_checkpoint_does(tiny_zoo: Path, tmp_path: Path) -> None:
    target, wanted = live(tiny_zoo / "base"), recipe(B, tiny_zoo)
    write(target, wanted)
    export_model(wanted, models(wanted), tmp_path / "out")
    assert torch.equal(logits(target.model), logits(live(tmp_path / "out").model))


def test_weights_are_rounded_to_the_recipes_type_even_in_a_wider_model(tiny_zoo: Path) -> None:
    target = LiveModel(transformers.AutoModelForCausalLM.from_pretrained(tiny_zoo / "base", dtype="float32"))
    wanted = recipe(B + "dtype: float32\nout_dtype: bfloat16\n", tiny_zoo)
    write(target, wanted)
    assert same(state(target), {name: tensor.float() for name, tensor in merged(wanted).items()})


def test_tied_embeddings_are_written_once_and_stay_tied(tiny_zoo: Path, tmp_path: Path) -> None:
    one, copied = (
        variant(tiny_zoo / name, tmp_path / name, change=change, tie_word_embeddings=True)
        for name, change in (("one", untie), ("two", copy_embedding))
    )
    for donor in (one, copied):
        target, wanted = live(donor), recipe(two(one, copied), tiny_zoo)
        target.poison()
        write(target, wanted)
        found, expected = state(target), merged(wanted)
        assert torch.equal(found["lm_head.weight"], expected["model.embed_tokens.weight"])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tied_model_never_takes_a_head_of_its_own(tiny_zoo: Path, tmp_path: Path) -> None:
    """Here only the model's class ties; the plan, which sees the config, merges both tensors."""
    one, copied = (
        variant(tiny_zoo / name, tmp_path / name, change=copy_embedding, tie_word_embeddings=None)
        for name in ("one", "two")
    )
    target = live(variant(one, tmp_path / "donor", tie_word_embeddings=True))
    write(target, recipe(two(one, copied), tiny_zoo))  # both merge alike
    uneven = recipe(
        two(one, copied).replace(
            "{weight: 1}", "{weight: [{filter: lm_head, value: 1}, {value: 2}], normalize: false}"
        ),
        tiny_zoo,
    )
    with pytest.raises(
        CheckpointError, match=r"ties it to lm_head\.weight, but the recipe merges the two differently"
    ):
        write(target, uneven)


def test_tensors_the_model_lacks_and_parameters_no_tensor_reaches_are_named(
    tiny_zoo: Path, tmp_path: Path
) -> None:
    def rename(state: dict[str, Tensor]) -> None:
        state["model.other.weight"] = state.pop("model.norm.weight")

    odd = variant(tiny_zoo / "one", tmp_path / "odd", change=rename)
    target = live(tiny_zoo / "base")
    before = state(target)
    with pytest.raises(CheckpointError) as caught:
        write(target, recipe(f"models: [{{model: {odd}}}]\nmerge_method: passthrough\n", tiny_zoo))
    assert [str(fault) for fault in caught.value.faults] == [
        "model.other.weight: the loaded model has no parameter of this name",
        "model.norm.weight: no tensor of the recipe reaches this parameter",
    ]
    assert same(state(target), before)


def test_a_plan_of_other_shapes_or_depth_is_refused(tiny_zoo: Path, tmp_path: Path) -> None:
    def widen(state: dict[str, Tensor]) -> None:
        state["lm_head.weight"] = torch.zeros(65, 32, dtype=torch.bfloat16)

    wide = variant(tiny_zoo / "one", tmp_path / "wide", change=widen)
    target = live(tiny_zoo / "base")
    with pytest.raises(CheckpointError, match=r"merged shape \[65, 32\], the loaded model's is \[64, 32\]"):
        write(target, recipe(f"models: [{{model: {wide}}}]\nmerge_method: passthrough\n", tiny_zoo))
    short = "slices: [{sources: [{model: $one, layer_range: [0, 3]}]}]\nmerge_method: passthrough\n"
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.\S+: no tensor of the recipe reaches"):
        write(target, recipe(short, tiny_zoo))  # its models are needed to change the number of layers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_is_named_by_tensor(tiny_zoo: Path, tmp_path: Path, bad: float) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["model.layers.2.mlp.up_proj.weight"][3, 4] = bad

    spoilt = variant(tiny_zoo / "one", tmp_path / "spoilt", change=spoil)
    with pytest.raises(
        NonFiniteWeightsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: .*NaN or infinity"
    ):
        write(live(tiny_zoo / "base"), recipe(two(spoilt, tiny_zoo / "two"), tiny_zoo))


@pytest.mark.parametrize("types", ["out_dtype: float16", "out_dtype: float32"])
def test_numbers_beyond_float16_are_not_finite_there(tiny_zoo: Path, types: str) -> None:
    """In the recipe's type, or in that of the live model."""
    target = LiveModel(transformers.AutoModelForCausalLM.from_pretrained(tiny_zoo / "base", dtype="float16"))
    text = "models: [{model: $one, parameters: {scale: 1e6}}]\nmerge_method: passthrough\n"
    with pytest.raises(NonFiniteWeightsError):
        write(target, recipe(f"{text}dtype: float32\n{types}\n", tiny_zoo))


DEEP = [
    ("one", 0, "two", 0),
    ("one", 1, "two", 3),
    ("two", 2, "one", 2),
    ("one", 0, "two", 1),
    ("two", 3, "one", 2),
]
SHALLOW = [("two", 3, "one", 1), ("one", 1, "two", 2)]
SAME = [("one", 0, "two", 1), ("one", 1, "two", 0), ("one", 2, "two", 3)]
Pairs = list[tuple[str, int, str, int]]


def along(pairs: Pairs) -> Recipe:
    """A merge of two layers per hop."""
    slices = [
        {
            "sources": [
                {"model": first, "layer_range": [a, a + 1], "parameters": {"weight": 0.7}},
                {"model": second, "layer_range": [b, b + 1], "parameters": {"weight": 0.2 + 0.1 * place}},
            ]
        }
        for place, (first, a, second, b) in enumerate(pairs)
    ]
    return Recipe.from_dict({"merge_method": "linear", "dtype": "float32", "slices": slices})


class AnyDepth:
    """A live model over two models of 3 and 4 layers."""

    def __init__(self, folder: Path) -> None:
        self.checkpoints = open_pair(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "one").eval()
        self.live = LiveModel(model, self.checkpoints)

    def write(self, wanted: Recipe) -> Any:
        self.live.poison()
        self.live.write(plan_merge(wanted, self.checkpoints), self.checkpoints)
        return self.live.model


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3Text", "GPT2", "Mixtral", "Qwen3Moe"])
def test_recipes_of_any_depth_compute_what_their_checkpoints_do(name: str, tmp_path: Path) -> None:
    """In one live model, in any order."""
    target = AnyDepth(make_pair(tmp_path / "pair", name))
    fresh = {}
    for number, pairs in enumerate((DEEP, SHALLOW, SAME)):
        model = exported(along(pairs), target.checkpoints, tmp_path / f"out{number}")
        fresh[len(pairs)] = model.state_dict(), results(model)
    for pairs in (DEEP, SHALLOW, SAME, DEEP):
        state, expected = fresh[len(pairs)]
        model = target.write(along(pairs))
        found = model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)
        assert_same(results(model), expected)


def test_layers_are_made_once_and_never_more_than_were_needed(tmp_path: Path) -> None:
    target = AnyDepth(make_pair(tmp_path / "pair", "Llama"))
    own = places(target.live)
    assert places(AnyDepth(tmp_path / "pair").live).keys() != own.keys()
    target.write(along(SHALLOW))
    assert places(target.live).keys() < own.keys()
    target.write(along(DEEP))
    deep = places(target.live)
    assert deep.keys() > own.keys()
    assert sum(tensor.numel() for tensor in deep.values()) == sum(
        tensor.numel() for tensor in target.live.model.parameters()
    )
    for pairs in (SAME, SHALLOW, DEEP, DEEP[::-1]):
        target.write(along(pairs))
        assert places(target.live).keys() <= deep.keys()
    assert places(target.live).keys() == deep.keys()


def places(target: LiveModel) -> dict[int, Tensor]:
    return {tensor.data_ptr(): tensor for tensor in target.model.parameters()}


def test_poison_reaches_the_layers_that_are_not_in_use(tmp_path: Path) -> None:
    target = AnyDepth(make_pair(tmp_path / "pair", "Llama"))
    target.write(along(DEEP))
    deep = places(target.live)
    target.live.write(plan_merge(along(SHALLOW), target.checkpoints), target.checkpoints)
    assert not any(tensor.isnan().any() for tensor in deep.values())
    target.live.poison()
    assert all(tensor.isnan().all() for tensor in deep.values())


def test_copied_layers_share_no_memory_with_their_pattern(tmp_path: Path) -> None:
    target = AnyDepth(make_pair(tmp_path / "pair", "Llama"))
    model = target.write(along(DEEP))
    for layer in model.model.layers:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        layer.mlp.up_proj.weight.data.zero_()
        changed = [
            name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        assert len(changed) == 1


def test_a_layer_of_a_kind_that_the_live_model_lacks_comes_from_its_source(tmp_path: Path) -> None:
    """Here one with a plain MLP, among layers of experts; the names of its tensors differ."""
    for child, config in (("one", {}), ("two", {"mlp_only_layers": [1]})):
        made = make_pair(tmp_path / f"for {child}", "Qwen3Moe", **config)
        (made / child).rename(tmp_path / child)
    target = AnyDepth(tmp_path)
    pairs: Pairs = [("one", 0, "two", 0), ("two", 1, "two", 1), ("two", 1, "two", 1), ("one", 2, "one", 1)]
    fresh = exported(along(pairs), target.checkpoints, tmp_path / "out")
    assert fresh.config.mlp_only_layers == [1, 2]
    for _ in range(2):
        assert_same(results(target.write(along(pairs))), results(fresh))
        target.write(along([("one", 0, "two", 0)]))


def test_a_recipe_of_another_depth_must_reach_every_parameter(tmp_path: Path) -> None:
    def remove(state: dict[str, Tensor]) -> None:
        for layer in range(4):
            state.pop(f"model.layers.{layer}.mlp.up_proj.weight", None)

    target = AnyDepth(make_pair(tmp_path / "pair", "Llama"))
    for child in ("one", "two"):
        less = variant(tmp_path / "pair" / child, tmp_path / child, change=remove)
        target.checkpoints[child] = Checkpoint.open(less)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.4\.mlp\.up_proj\.weight: no tensor of the recipe"
    ):
        target.write(along(DEEP))


def test_a_config_that_cannot_say_what_the_layers_are_is_refused(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / "pair", "Llama")
    for child in ("one", "two"):
        variant(folder / child, tmp_path / child, expert_layer_period=2)
    with pytest.raises(CheckpointError, match="expert_layer_period"):
        AnyDepth(tmp_path).write(along(DEEP))
