"""Recipes over models of several modules: what mergekit makes of them, and what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from evomerge.errors import CheckpointError, ConfigurationError, Fault
from evomerge.merge.check import check_recipe
from evomerge.merge.export import export_model
from evomerge.merge.plan import plan_merge
from tests.modular import FAMILIES, WORDS, add_processor, load, logits, make_family

from .models import variant
from .zoo import assert_same, by_mergekit, models, plan, recipe, tensors

Family = Callable[..., Path]

LINEAR = """
models: [{model: $one, parameters: {weight: 0.7}}, {model: $two, parameters: {weight: 0.4}}]
merge_method: linear
dtype: float32
"""
# To mergekit the two tensors of a Qwen's projector are layers, along which a gradient would run.
TASK_ARITHMETIC = """
models:
- {model: $one, parameters: {weight: 0.6}}
- {model: $two, parameters: {weight: [{filter: merger, value: 0.2}, {value: [-0.3, 0.9]}]}}
merge_method: task_arithmetic
base_model: $base
dtype: float32
"""
BY_MODULE = """
modules:
  text_decoder:
    models:
    - {model: $one, parameters: {weight: [{filter: self_attn, value: [0.1, 0.5, 1]}, {value: 0.3}]}}
    - {model: $two}
    parameters: {weight: 0.8}
  multi_modal_projector: {models: [{model: $two}]}
  vision_tower:
    models: [{model: $one}, {model: $two, parameters: {weight: -0.4}}]
merge_method: task_arithmetic
base_model: $base
parameters: {weight: 0.25}
dtype: float32
"""
SLICES = """
modules:
  text_decoder:
    slices:
    - sources: [{model: $one, layer_range: [0, 2]}, {model: $two, layer_range: [1, 3]}]
      parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.5}]}
    - sources: [{model: $two, layer_range: [1, 3]}, {model: $one, layer_range: [0, 2]}]
      parameters: {weight: 1}
  multi_modal_projector: {models: [{model: $two, parameters: {weight: 1}}]}
  vision_tower: {models: [{model: $one, parameters: {weight: 1}}]}
merge_method: linear
dtype: float32
"""
T5_SLICES = """
modules:
  encoder: {models: [{model: $one}]}
  decoder:
    slices:
    - {sources: [{model: $one, layer_range: [0, 2]}]}
    - {sources: [{model: $two, layer_range: [1, 3]}]}
  shared: {models: [{model: $two}]}
merge_method: passthrough
dtype: float32
"""
TEXT_ONLY = """
modules:
  text_decoder:
    models: [{model: $llava/one, parameters: {weight: 0.5}}, {model: $mistral/two, parameters: {weight: 0.5}}]
merge_method: linear
dtype: float32
"""


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Kind of model -> folder with `base`, `one` and `two` of it."""
    made: dict[str, Path] = {}

    def make(name: str, **settings: Any) -> Path:
        key = f"{name} {settings}"
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp(name), name, **settings)
        return made[key]

    return make


@pytest.fixture
def both(family: Family, tmp_path: Path) -> Path:
    """A folder with `llava/one` and so on, and `mistral/one` and so on, its language model."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "llava").symlink_to(family("Llava"))
    (tmp_path / "zoo" / "mistral").symlink_to(family("Mistral"))
    return tmp_path / "zoo"


def for_mergekit(name: str, family: Family) -> Path:
    # mergekit 0.1.5 leaves out the language model of a LLaVA in any format but this.
    return family(name, as_held=name == "Llava")


def exported(text: str, zoo: Path, out: Path) -> tuple[dict[str, Tensor], list[Fault]]:
    """The tensors of an exported checkpoint, and what was warned of."""
    wanted = recipe(text, zoo)
    check_recipe(wanted)
    warned: list[Fault] = []
    export_model(wanted, models(wanted), out, warn=warned.append)
    return tensors(out), warned


def refusal(text: str, zoo: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        plan(text, zoo)
    return str(caught.value).replace(f"{zoo}/", "$")


@pytest.mark.parametrize("text", [LINEAR, TASK_ARITHMETIC], ids=["linear", "task_arithmetic"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_several_modules_merge_whole_as_in_mergekit(
    name: str, text: str, family: Family, tmp_path: Path
) -> None:
    zoo = for_mergekit(name, family)
    ours, warned = exported(text, zoo, tmp_path / "ours")
    assert warned == []
    assert_same(ours, by_mergekit(recipe(text, zoo), tmp_path / "theirs"))
    assert ours.keys() == tensors(zoo / "one").keys()
    logits(load(tmp_path / "ours"))


@pytest.mark.parametrize("name", ["Mistral3", "Qwen2_5_VL"])
def test_every_module_has_models_and_parameters_of_its_own_as_in_mergekit(
    name: str, family: Family, tmp_path: Path
) -> None:
    ours, _ = exported(BY_MODULE, family(name), tmp_path / "ours")
    assert_same(ours, by_mergekit(recipe(BY_MODULE, family(name)), tmp_path / "theirs"))
    logits(load(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("name", "text", "key", "depth"),
    [
        ("Mistral3", SLICES, "text_config.num_hidden_layers", 4),
        ("Qwen2_5_VL", SLICES, "text_config.num_hidden_layers", 4),
        ("T5", T5_SLICES, "num_decoder_layers", 4),
    ],
)
def test_slices_in_a_module_are_as_in_mergekit(
    name: str, text: str, key: str, depth: int, family: Family, tmp_path: Path
) -> None:
    zoo = family(name)
    ours, _ = exported(text, zoo, tmp_path / "ours")
    assert_same(ours, by_mergekit(recipe(text, zoo), tmp_path / "theirs"))
    config: Any = json.loads((tmp_path / "ours" / "config.json").read_text())
    before: Any = json.loads((zoo / "one" / "config.json").read_text())
    for piece in key.split("."):
        outer, config, before = config, config[piece], before[piece]
    assert (before, config) == (3, depth)
    assert len(outer.get("layer_types", range(depth))) == depth
    logits(load(tmp_path / "ours"))


def test_slices_in_a_llava_are_those_of_mergekit_under_the_names_that_it_infers(
    family: Family, tmp_path: Path
) -> None:
    zoo = family("Llava", as_held=True)
    ours, _ = exported(SLICES, zoo, tmp_path / "ours")
    said = yaml.safe_load(SLICES)["modules"]
    tower = said["vision_tower"]
    inferred = {
        "model.language_model.layers": said["text_decoder"],
        "model.vision_tower.encoder.layers": tower,
        # All tensors outside the layers; their models differ by module here, so they are compared below.
        "default": {"models": [{"model": "$one", "parameters": {"weight": 1}}]},
    }
    text = yaml.safe_dump({**yaml.safe_load(SLICES), "modules": inferred})
    theirs = by_mergekit(recipe(text, zoo).to_yaml(), tmp_path / "theirs")
    layers = {name for name in ours if ".layers." in name}
    assert_same({name: ours[name] for name in layers}, {name: theirs[name] for name in layers})
    sources = {name: tensors(zoo / name) for name in ("one", "two")}
    for name in ours.keys() - layers:
        if "projector" in name:
            assert torch.equal(ours[name], sources["two"][name]), name
        elif "vision" in name:
            assert torch.equal(ours[name], sources["one"][name]), name
    logits(load(tmp_path / "ours"))


INFERRED = """
modules:
  model.language_model.layers:
    slices:
    - sources: [{model: $one, layer_range: [0, 2]}, {model: $two, layer_range: [1, 3]}]
      parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.5}]}
    - sources: [{model: $two, layer_range: [1, 3]}, {model: $one, layer_range: [0, 2]}]
      parameters: {weight: 1}
  model.vision_tower.encoder.layers:
    models: [{model: $one, parameters: {weight: 0.3}}, {model: $two, parameters: {weight: [0.2, 0.6]}}]
  default:
    models: [{model: $one, parameters: {weight: 0.9}}, {model: $two, parameters: {weight: 0.4}}]
merge_method: linear
dtype: float32
"""


def test_the_names_that_mergekit_infers_mean_the_same_here(family: Family, tmp_path: Path) -> None:
    zoo = family("Llava", as_held=True)
    ours, warned = exported(INFERRED, zoo, tmp_path / "ours")
    assert warned == []
    assert_same(ours, by_mergekit(recipe(INFERRED, zoo).to_yaml(), tmp_path / "theirs"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    logits(load(tmp_path / "ours"))
    assert plan(INFERRED, zoo).num_layers == 4


def test_inferred_names_are_those_of_the_model_in_whatever_form_it_is_stored(
    family: Family, tmp_path: Path
) -> None:
    """As mergekit asks transformers what a model's tensors are called."""
    held, _ = exported(INFERRED, family("Llava", as_held=True), tmp_path / "held")
    stored, _ = exported(INFERRED, family("Llava"), tmp_path / "stored")
    assert held.keys().isdisjoint(stored.keys())
    assert sorted(map(_content, held.values())) == sorted(map(_content, stored.values()))
    in_file = INFERRED.replace("model.language_model.layers", "language_model.model.layers")
    assert_same(exported(in_file, family("Llava"), tmp_path / "in_file")[0], stored)


def _content(tensor: Tensor) -> tuple[float, ...]:
    return (*map(float, tensor.shape), *tensor.double().flatten().tolist())


def test_all_of_a_module_without_layers_is_its_range_from_0_to_0(family: Family, tmp_path: Path) -> None:
    zoo = family("Mistral3")
    said = yaml.safe_load(SLICES)
    sources = [{"model": f"${name}", "layer_range": [0, 0]} for name in ("one", "two")]
    said["modules"]["multi_modal_projector"] = {
        "slices": [{"sources": sources, "parameters": {"weight": 0.5}}]
    }
    text = yaml.safe_dump(said)
    ours, _ = exported(text, zoo, tmp_path / "ours")
    assert_same(ours, by_mergekit(recipe(text, zoo), tmp_path / "theirs"))
    said["modules"]["text_decoder"]["slices"][0] = said["modules"]["multi_modal_projector"]["slices"][0]
    with pytest.raises(CheckpointError, match=r"has 3 layers, got layer_range \[0, 0\]"):
        plan(yaml.safe_dump(said), zoo)


def test_a_slip_in_an_inferred_name_is_refused_with_those(family: Family) -> None:
    found = refusal(INFERRED.replace("default:", "defualt:"), family("Llava", as_held=True))
    assert "modules.defualt: unknown module (did you mean 'default'?); the models have default, " in found
    assert "model.language_model.layers, model.vision_tower.encoder.layers" in found


def test_what_lies_outside_the_layers_may_be_left_out_by_its_inferred_name(
    family: Family, tmp_path: Path
) -> None:
    zoo = family("Llava", as_held=True)
    said = yaml.safe_load(INFERRED)
    del said["modules"]["default"]
    ours, (warning,) = exported(yaml.safe_dump(said), zoo, tmp_path / "ours")
    assert "does not speak of default, so the merged model gets" in warning.reason
    whole, _ = exported(INFERRED, zoo, tmp_path / "whole")
    donor = tensors(zoo / "one")
    for name, tensor in ours.items():
        assert torch.equal(tensor, whole[name] if ".layers." in name else donor[name]), name


def test_a_whole_projector_may_be_said_to_be_a_slice_as_in_mergekit(family: Family, tmp_path: Path) -> None:
    """To mergekit its two matrices are layers."""
    zoo = family("Qwen2_5_VL")
    said = yaml.safe_load(SLICES)
    sources = [{"model": f"${name}", "layer_range": [0, 2]} for name in ("one", "two")]
    said["modules"]["multi_modal_projector"] = {
        "slices": [{"sources": sources, "parameters": {"weight": 0.5}}],
    }
    text = yaml.safe_dump(said)
    ours, _ = exported(text, zoo, tmp_path / "ours")
    assert_same(ours, by_mergekit(recipe(text, zoo), tmp_path / "theirs"))
    for source in sources:
        source["layer_range"] = [1, 2]
    with pytest.raises(CheckpointError, match=r"one has 0 layers, got layer_range \[1, 2\]"):
        plan(yaml.safe_dump(said), zoo)


def test_layers_of_a_tower_move_too(family: Family, tmp_path: Path) -> None:
    text = """
modules:
  vision_tower:
    slices: [{sources: [{model: $one, layer_range: [0, 2]}]}, {sources: [{model: $two, layer_range: [1, 2]}]}]
merge_method: passthrough
"""
    ours, _ = exported(text, family("Llava"), tmp_path / "out")
    two = tensors(family("Llava") / "two")
    layer = "vision_tower.encoder.layers.{}.mlp.fc1.weight"
    assert torch.equal(ours[layer.format(2)], two[layer.format(1)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vision_config"]["num_hidden_layers"], config["text_config"]["num_hidden_layers"]) == (
        3,
        3,
    )
    logits(load(tmp_path / "out"))
    qwen = recipe(text, family("Qwen2_5_VL"))
    with pytest.raises(
        CheckpointError, match=r"fullatt_block_indexes: \[1\] says what layers are by their number"
    ):
        export_model(qwen, models(qwen), tmp_path / "qwen")


def test_a_module_left_out_is_the_donors(family: Family, tmp_path: Path) -> None:
    text = "modules: {vision_tower: {models: [{model: $one}, {model: $two}]}}\nmerge_method: linear\n"
    text += "parameters: {weight: 0.5}\ndtype: float32\n"
    zoo = family("Llava")
    ours, warned = exported(text, zoo, tmp_path / "out")
    one, two = tensors(zoo / "one"), tensors(zoo / "two")
    for name, tensor in ours.items():
        expected = (one[name] + two[name]) / 2 if name.startswith("vision_tower") else one[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    (warning,) = warned
    assert warning.path == "modules"
    assert (
        f"does not speak of multi_modal_projector, text_decoder, so the merged model gets {zoo}/one's"
        in str(warning)
    )


@pytest.mark.parametrize("base", ["", "base_model: $mistral/base\n", "base_model: $llava/base\n"])
def test_a_text_model_merges_with_the_language_model_of_another(
    base: str, both: Path, tmp_path: Path
) -> None:
    """The paper's merge of a LLaVA with a language model; the base may be either."""
    text = TEXT_ONLY + base
    if base:
        text = text.replace("linear", "task_arithmetic")
    ours, _ = exported(text, both, tmp_path / "out")
    donor = both / "llava" / ("base" if "llava" in base else "one")
    kept, one, two = tensors(donor), tensors(both / "llava" / "one"), tensors(both / "mistral" / "two")
    start = {name: torch.zeros(()) for name in ours}
    if "mistral" in base:
        start = {
            f"language_model.{name}": tensor for name, tensor in tensors(both / "mistral" / "base").items()
        }
    elif "llava" in base:
        start = kept
    assert ours.keys() == kept.keys()
    for name, tensor in ours.items():
        other = two.get(name.removeprefix("language_model."))
        if other is None:
            expected = kept[name]
        else:
            zero = start[name]
            expected = zero + 0.5 * (one[name] - zero) + 0.5 * (other - zero)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-6)
    logits(load(tmp_path / "out"))


def test_layers_of_a_text_model_can_be_stacked_into_another(both: Path, tmp_path: Path) -> None:
    text = """
modules:
  text_decoder:
    slices:
    - {sources: [{model: $mistral/one, layer_range: [0, 2]}]}
    - {sources: [{model: $llava/two, layer_range: [1, 3]}]}
merge_method: passthrough
"""
    ours, _ = exported(text, both, tmp_path / "out")
    layer = "model.layers.{}.mlp.up_proj.weight"
    mistral, llava = tensors(both / "mistral" / "one"), tensors(both / "llava" / "two")
    assert torch.equal(ours["language_model." + layer.format(1)], mistral[layer.format(1)])
    assert torch.equal(ours["language_model." + layer.format(3)], llava["language_model." + layer.format(2)])
    assert torch.equal(ours["language_model.model.embed_tokens.weight"], mistral["model.embed_tokens.weight"])
    assert torch.equal(ours["language_model.lm_head.weight"], llava["language_model.lm_head.weight"])
    logits(load(tmp_path / "out"))


def test_one_format_of_a_model_merges_with_another(family: Family, tmp_path: Path) -> None:
    (tmp_path / "stored").symlink_to(family("Llava"))
    (tmp_path / "held").symlink_to(family("Llava", as_held=True))
    text = LINEAR.replace("$two", "$held/two").replace("$one", "$stored/one")
    mixed, _ = exported(text, tmp_path, tmp_path / "mixed")
    alike, _ = exported(LINEAR, family("Llava"), tmp_path / "alike")
    assert_same(mixed, alike, exact=True)


def test_mergekit_reads_what_was_merged(family: Family, tmp_path: Path) -> None:
    zoo = family("Qwen2_5_VL")
    ours, _ = exported(SLICES, zoo, tmp_path / "zoo" / "one")
    exported(SLICES.replace("$one", "$base"), zoo, tmp_path / "zoo" / "two")
    again, _ = exported(LINEAR, tmp_path / "zoo", tmp_path / "again")
    assert_same(again, by_mergekit(recipe(LINEAR, tmp_path / "zoo"), tmp_path / "theirs"))
    written = (tmp_path / "zoo" / "one" / "mergekit_config.yml").read_text()
    assert_same(ours, by_mergekit(written, tmp_path / "from_written"))


def test_files_of_the_processor_go_along_with_the_donor(both: Path, family: Family, tmp_path: Path) -> None:
    one = variant(both / "llava" / "one", tmp_path / "one")
    add_processor(one)
    text = TEXT_ONLY.replace("$llava/one", str(one)) + "base_model: $mistral/base\n"
    exported(text.replace("linear", "task_arithmetic"), both, tmp_path / "out")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (one / name).read_bytes()


def test_a_plain_model_calls_its_only_module_default_or_text_decoder(tiny_zoo: Path) -> None:
    text = "models: [{model: $one}, {model: $two}]\n"
    rest = "merge_method: linear\nparameters: {weight: 0.5}\n"
    plain = plan(text + rest, tiny_zoo)
    for name in ("default", "text_decoder"):
        named = plan(f"modules: {{{name}: {{{text.strip()}}}}}\n{rest}", tiny_zoo)
        assert named.tensors == plain.tensors
        assert named.donor == plain.donor
    fault = refusal(f"modules: {{defualt: {{{text.strip()}}}}}\n{rest}", tiny_zoo)
    assert "modules.defualt: unknown module (did you mean 'default'?); the models have default" in fault


def test_a_module_that_the_models_lack_is_refused_with_those_they_have(family: Family) -> None:
    text = TEXT_ONLY.replace("$llava/", "$").replace("$mistral/", "$").replace("text_decoder", "text_decodr")
    fault = refusal(text, family("Llava"))
    assert "modules.text_decodr: unknown module (did you mean 'text_decoder'?); the models have " in fault
    assert "multi_modal_projector, text_decoder, vision_tower" in fault


def test_a_model_without_the_module_is_refused(both: Path) -> None:
    text = TEXT_ONLY.replace("text_decoder", "vision_tower")
    fault = refusal(text, both)
    assert "modules.vision_tower.models: $mistral/two has no module vision_tower, only text_decoder" in fault
    whole = "models: [{model: $llava/one}, {model: $mistral/one}]\nmerge_method: linear\n"
    fault = refusal(whole + "parameters: {weight: 1}\n", both)
    assert "models: $mistral/one has no module multi_modal_projector, only text_decoder" in fault
    assert "has no module vision_tower" in fault


def test_slices_need_to_say_of_which_module(family: Family) -> None:
    text = "slices: [{sources: [{model: $one, layer_range: [0, 2]}]}]\nmerge_method: passthrough\n"
    fault = refusal(text, family("Llava"))
    assert (
        "slices: the models have several modules, multi_modal_projector, text_decoder, vision_tower; "
        in fault
    )
    assert "say under 'modules' whose slices these are" in fault


def test_layers_that_a_module_lacks_are_refused(family: Family) -> None:
    text = SLICES.replace("text_decoder", "vision_tower", 1).replace(
        "  vision_tower: {models", "  text_decoder: {models"
    )
    fault = refusal(text, family("Llava"))
    assert "modules.vision_tower.slices.0.sources: $two has 2 layers, got layer_range [1, 3]" in fault


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("[1, 2]", "[1, 2]", "layer 1 of $one lacks it, unlike the layer whose place it takes, number 0"),
        ("[0, 2]", "[0, 1]", "layer 0 of $two has it, unlike the layer whose place it takes, number 2"),
    ],
)
def test_a_layer_in_the_place_of_one_with_other_tensors_is_refused(
    family: Family, first: str, second: str, said: str
) -> None:
    text = T5_SLICES.replace("[0, 2]", first).replace("[1, 3]", second)
    fault = refusal(text, family("T5"))
    assert said in fault
    assert "relative_attention_bias" in fault


def test_models_of_which_none_has_all_modules_are_refused(family: Family, tmp_path: Path) -> None:
    (tmp_path / "llava").symlink_to(family("Llava"))
    (tmp_path / "t5").symlink_to(family("T5"))
    text = "models: [{model: $llava/one}, {model: $t5/one}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    fault = refusal(text, tmp_path)
    assert "models: expected a model with all the modules of the others, found $llava/one: " in fault
    assert "$t5/one: decoder, encoder, shared" in fault


def test_shapes_that_differ_in_a_module_are_refused(family: Family, tmp_path: Path) -> None:
    name = "vision_tower.encoder.layers.1.mlp.fc1.bias"

    def shorten(state: dict[str, Tensor]) -> None:
        state[name] = state[name][:-1].clone()

    variant(family("Llava") / "two", tmp_path / "two", change=shorten)
    fault = refusal(LINEAR.replace("$one", str(family("Llava") / "one")), tmp_path)
    assert f"{name}: the models differ in its shape: " in fault
    assert "[12], $two [11]" in fault


def test_tensors_that_a_language_model_lacks_are_named(both: Path, tmp_path: Path) -> None:
    def untie(state: dict[str, Tensor]) -> None:
        del state["lm_head.weight"]

    tied = variant(both / "mistral" / "two", tmp_path / "tied", change=untie, tie_word_embeddings=True)
    fault = refusal(TEXT_ONLY.replace("$mistral/two", str(tied)), both)
    assert f"{tied}: lm_head.weight: missing, but $llava/one has it" in fault
    assert "this model ties its output head to its embedding" in fault


def test_the_plan_tells_the_layers_of_every_module(family: Family) -> None:
    found = plan(SLICES, family("Llava"))
    layers = {module.name: [layer for _, layer in module.layers] for module in found.modules}
    assert layers == {"multi_modal_projector": [], "text_decoder": [0, 1, 1, 2], "vision_tower": [0, 1]}
    assert found.num_layers == 4


def test_the_vocabulary_of_a_language_model_follows_another(both: Path, tmp_path: Path) -> None:
    """A language model with fewer tokens gets the image token's row from the model that has it."""
    from tests.tiny import make_tokenizer

    def cut(state: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][: WORDS - 1].clone()

    text_model = variant(both / "mistral" / "two", tmp_path / "text", change=cut, vocab_size=WORDS - 1)
    llava = variant(both / "llava" / "one", tmp_path / "vlm")
    for folder, count in ((text_model, WORDS - 1), (llava, WORDS)):
        make_tokenizer().save_pretrained(folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < count}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    text = TEXT_ONLY.replace("$llava/one", str(llava)).replace("$mistral/two", str(text_model))
    wanted = recipe(text, both)
    with pytest.raises(CheckpointError, match="its vocabulary differs"):
        export_model(wanted, models(wanted), tmp_path / "refused")
    ours, _ = exported(text + "tokenizer_source: union\n", both, tmp_path / "out")
    one, two = tensors(llava), tensors(text_model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mine, other = one[f"language_model.{name}"], two[name]
        torch.testing.assert_close(ours[f"language_model.{name}"][:-1], (mine[:-1] + other) / 2)
        torch.testing.assert_close(ours[f"language_model.{name}"][-1], mine[-1])
    logits(load(tmp_path / "out"))


def test_an_encoder_and_its_decoder_have_no_tokens_that_could_move(family: Family, tmp_path: Path) -> None:
    from tests.tiny import make_tokenizer

    folder = variant(family("T5") / "one", tmp_path / "one")
    make_tokenizer().save_pretrained(folder)
    text = "models: [{model: $one}]\nmerge_method: passthrough\ntokenizer_source: union\n"
    wanted = recipe(text, tmp_path)
    with pytest.raises(CheckpointError, match="has no language model by itself whose tokens could be told"):
        export_model(wanted, models(wanted), tmp_path / "out")


def test_the_config_of_every_module_says_the_type_that_was_written(family: Family, tmp_path: Path) -> None:
    config = json.loads((family("Llava") / "one" / "config.json").read_text())
    nested = {key: {**config[key], "torch_dtype": "float32"} for key in ("text_config", "vision_config")}
    variant(family("Llava") / "one", tmp_path / "one", **nested)
    text = "models: [{model: $one}]\nmerge_method: passthrough\nout_dtype: bfloat16\n"
    exported(text, tmp_path, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in (found, found["text_config"], found["vision_config"]):
        assert part["torch_dtype"] == "bfloat16"


def test_tensors_left_out_keep_their_bits_in_their_own_type(family: Family, tmp_path: Path) -> None:
    def halve(state: dict[str, Tensor]) -> None:
        for name in state:
            state[name] = state[name].to(torch.bfloat16)

    for name in ("one", "two"):
        variant(family("Llava") / name, tmp_path / name, change=halve)
    text = TEXT_ONLY.replace("$llava/", "$").replace("$mistral/", "$").replace("dtype: float32\n", "")
    text += "parameters: {scale: 3}\n"
    wanted = recipe(text, tmp_path)
    made = plan_merge(wanted, models(wanted))
    assert {tensor.dtype for tensor in made.tensors} == {"bfloat16"}
    export_model(wanted, models(wanted), tmp_path / "out")
    ours, one = tensors(tmp_path / "out"), tensors(tmp_path / "one")
    assert all(torch.equal(ours[name], one[name]) for name in ours if not name.startswith("language_model"))
