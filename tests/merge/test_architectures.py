"""Every architecture merges like in mergekit, and lies in a live model as in the exported checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from evomerge.errors import CheckpointError
from evomerge.merge.export import export_model
from evomerge.merge.live import LiveModel
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe
from tests.architectures import MODELS, WORDS, make_family

from .models import variant
from .zoo import assert_same, by_mergekit, models, recipe, tensors

Family = Callable[..., Path]

LINEAR = """
models: [{model: $one, parameters: {weight: 0.7}}, {model: $two, parameters: {weight: 0.4}}]
merge_method: linear
dtype: float32
"""
TASK_ARITHMETIC = """
models: [{model: $one, parameters: {weight: 0.6}}, {model: $two, parameters: {weight: -0.3}}]
merge_method: task_arithmetic
base_model: $base
dtype: float32
"""
TIES = """
models: [{model: $one, parameters: {weight: 0.6}}, {model: $two, parameters: {weight: 0.5}}]
merge_method: ties
base_model: $base
parameters: {density: 0.4}
dtype: float32
"""
STACK = """
slices:
- {sources: [{model: $one, layer_range: [0, 3]}]}
- {sources: [{model: $two, layer_range: [1, 3]}]}
merge_method: passthrough
dtype: float32
"""

FOR_MERGEKIT: dict[str, dict[str, Any]] = {"StableLm": {"qk_layernorm": False}}
"""mergekit 0.1.5 leaves out StableLM's norms of queries and keys, which transformers then misses."""

CONSTANTS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
GATES = {"Mixtral": ".block_sparse_moe.gate", "Qwen3Moe": ".mlp.gate"}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Architecture and changes of its config -> folder with `base`, `one` and `two` of it."""
    made: dict[str, Path] = {}

    def make(name: str, **config: Any) -> Path:
        key = f"{name} {config}"
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp(name), name, **config)
        return made[key]

    return make


@pytest.fixture(params=MODELS)
def zoo(request: pytest.FixtureRequest, family: Family) -> Path:
    return family(request.param)


def exported(text: str, zoo: Path, out: Path) -> tuple[Recipe, transformers.PreTrainedModel]:
    """A recipe and its exported checkpoint, loaded afresh."""
    wanted = recipe(text, zoo)
    export_model(wanted, models(wanted), out)
    return wanted, load(out)


def load(folder: Path) -> transformers.PreTrainedModel:
    """A model, from a checkpoint in which transformers finds all tensors and no others."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: torch.nn.Module) -> Tensor:
    words = torch.randint(3, WORDS, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(words).logits
    assert found.isfinite().all()
    return found


def assert_holds(live: LiveModel, wanted: Recipe, fresh: transformers.PreTrainedModel) -> None:
    """Writing a recipe makes the live model, whatever it held, the freshly loaded one to the last bit."""
    sources = models(wanted)
    live.poison()
    assert all(tensor.isnan().all() for tensor in live.model.state_dict().values())
    live.write(plan_merge(wanted, sources), sources)
    found, expected = live.model.state_dict(), fresh.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(live.model), logits(fresh))


def test_a_recipe_in_a_live_model_is_its_exported_checkpoint(zoo: Path, tmp_path: Path) -> None:
    live = LiveModel(load(zoo / "one"))
    for name, text in (("linear", LINEAR), ("ties", TIES)):
        assert_holds(live, *exported(text, zoo, tmp_path / name))
    assert not torch.equal(logits(load(zoo / "one")), logits(live.model))


def test_a_stack_of_layers_in_a_live_model_is_its_exported_checkpoint(zoo: Path, tmp_path: Path) -> None:
    """The live model is made from the config alone, so transformers knows no checkpoint of it."""
    wanted, fresh = exported(STACK, zoo, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == 5
    assert_holds(LiveModel(transformers.AutoModelForCausalLM.from_config(config).eval()), wanted, fresh)


def test_a_whole_model_passed_through_computes_what_it_did(zoo: Path, tmp_path: Path) -> None:
    text = "slices: [{sources: [{model: $two, layer_range: [0, 3]}]}]\nmerge_method: passthrough\n"
    _, fresh = exported(text, zoo, tmp_path / "out")
    assert torch.equal(logits(fresh), logits(load(zoo / "two")))


def test_layers_in_a_stack_stay_what_they_were(zoo: Path, tmp_path: Path) -> None:
    """A stack of the last two layers computes what they do in the whole model."""
    text = "slices: [{sources: [{model: $two, layer_range: [1, 3]}]}]\nmerge_method: passthrough\n"
    _, short = exported(text, zoo, tmp_path / "out")
    whole = load(zoo / "two")
    layers = whole.base_model.h if hasattr(whole.base_model, "h") else whole.base_model.layers
    layers[0].forward = lambda hidden, *_, **__: hidden
    assert torch.equal(logits(short), logits(whole))


def store_constants(state: dict[str, Tensor]) -> None:
    """Add what old checkpoints of GPT-NeoX, such as Pythia's, hold beside the weights."""
    for layer in range(3):
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 64, 64).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)


def old_style(zoo: Path, folder: Path) -> Path:
    for name in ("base", "one", "two"):
        variant(zoo / name, folder / name, change=store_constants)
    return folder


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("name", MODELS)
def test_a_merge_is_mergekits(name: str, method: str, family: Family, tmp_path: Path) -> None:
    zoo = family(name, **FOR_MERGEKIT.get(name, {}))
    if name == "GPTNeoX":
        zoo = old_style(zoo, tmp_path)  # mergekit 0.1.5 merges no others
    text = {"linear": LINEAR, "task_arithmetic": TASK_ARITHMETIC}[method]
    wanted, fresh = exported(text, zoo, tmp_path / "out")
    theirs = by_mergekit(wanted, tmp_path / "theirs")
    ours = tensors(tmp_path / "out")
    if name in ("Mixtral", "Qwen3Moe"):  # mergekit stores experts stacked, as transformers holds them
        ours = {key: tensor for key, tensor in ours.items() if ".experts." not in key}
        theirs = {key: tensor for key, tensor in theirs.items() if ".experts." not in key}
        theirs = {key.replace(".mlp.gate", GATES[name]): tensor for key, tensor in theirs.items()}
    assert_same(ours, {key: tensor for key, tensor in theirs.items() if not key.endswith(CONSTANTS)})
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert_same(fresh.state_dict(), other.state_dict())
    torch.testing.assert_close(logits(fresh), logits(other), rtol=1e-4, atol=1e-4)


def test_constants_in_old_checkpoints_are_not_merged(family: Family, tmp_path: Path) -> None:
    zoo = family("GPTNeoX")
    old = old_style(zoo, tmp_path)
    wanted, fresh = exported(LINEAR, old, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(zoo / "one").keys()
    assert_holds(LiveModel(transformers.AutoModelForCausalLM.from_pretrained(old / "one")), wanted, fresh)


def test_names_without_the_models_prefix_lead_to_the_same_parameters(family: Family, tmp_path: Path) -> None:
    """The hub's GPT-2 is stored as `h.0.ln_1.weight`, not `transformer.h.0.ln_1.weight`."""

    def strip(state: dict[str, Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    zoo = family("GPT2")
    for name in ("one", "two"):
        variant(zoo / name, tmp_path / name, change=strip)
    wanted, fresh = exported(LINEAR, tmp_path, tmp_path / "out")
    assert "h.2.attn.c_proj.weight" in tensors(tmp_path / "out")
    assert_holds(LiveModel(load(tmp_path / "one")), wanted, fresh)


@pytest.mark.parametrize(
    ("name", "shape", "place"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w1.weight", (32, 16), (2, slice(0, 32))),
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", (32, 16), (2, slice(32, 64))),
    ],
)
def test_an_expert_is_a_slice_of_the_live_parameter(
    name: str, shape: tuple[int, ...], place: tuple[Any, ...], family: Family
) -> None:
    live = LiveModel(load(family("Mixtral") / "one"))
    target = live.targets[name]
    assert tuple(target.shape) == shape
    assert target.is_contiguous()
    target.fill_(7.0)
    whole = live.model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert bool((whole[place] == 7.0).all())
    assert int((whole == 7.0).sum()) == target.numel()


def test_a_checkpoint_with_stacked_experts_is_written_as_it_is(family: Family, tmp_path: Path) -> None:
    """transformers loads both forms; mergekit stores this one."""
    for name in ("one", "two"):
        load(family("Qwen3Moe") / name).save_pretrained(tmp_path / name, save_original_format=False)
    wanted, fresh = exported(LINEAR, tmp_path, tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(tmp_path / "out")
    assert_holds(LiveModel(load(tmp_path / "one")), wanted, fresh)


def test_a_config_of_another_depth_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    variant(family("Qwen2") / "one", tmp_path / "one", num_hidden_layers=4)
    wanted = recipe("models: [{model: $one}]\nmerge_method: passthrough\n", tmp_path)
    with pytest.raises(CheckpointError, match=r"one: .* num_hidden_layers: 4, but the tensors make 3 layers"):
        plan_merge(wanted, models(wanted))
