"""Paths read from recipes and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.decoder import is_mlp_output
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, ConfigurationError
from evomerge.merge.anatomy import anatomy_of
from evomerge.report.path_files import checkpoint_recipe, path_of_file
from evomerge.spaces.folding import path_recipe
from evomerge.spaces.path import Hop


def recipe_file(folder: Path, **recipe: Any) -> Path:
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump({"merge_method": "passthrough", "dtype": "float32", **recipe}))
    return file


def piece(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    source = {"model": model, "layer_range": [first, end]}
    return {"sources": [{**source, **({"parameters": parameters} if parameters else {})}]}


def test_slices_become_hops(tmp_path: Path) -> None:
    found = path_of_file(
        recipe_file(tmp_path, slices=[piece("a/x", 0, 8), piece("b", 5, 13), piece("a/x", 3, 4)])
    )
    assert found.pieces == ("A 0-7", "B 5-12", "A 3")
    assert found.depths == {"a/x": 8, "b": 13}
    assert found.title == str(tmp_path / "recipe.yml")


def test_of_several_modules_the_path_is_that_of_the_language_model(tmp_path: Path) -> None:
    modules = {
        "multi_modal_projector": {"models": [{"model": "a"}]},
        "text_decoder": {"slices": [piece("a", 0, 2), piece("b", 1, 3)], "parameters": {"scale": 0.5}},
    }
    found = path_of_file(recipe_file(tmp_path, modules=modules))
    hops = [(hop.model, hop.layer, hop.scale) for hop in found.hops]
    assert hops == [("a", 0, 0.5), ("a", 1, 0.5), ("b", 1, 0.5), ("b", 2, 0.5)]


def test_the_scale_shown_is_that_of_the_mlps_output(tmp_path: Path) -> None:
    slices = [
        piece("a", 0, 1, scale=0.5),
        piece("a", 1, 2, scale=[{"filter": "o_proj", "value": 3}, {"value": 1.0}]),
        piece("a", 2, 3, scale=[{"filter": "mlp.down_proj", "value": 0.25}, {"value": 7}]),
        piece("a", 3, 6, scale=[{"filter": "model.layers.4.mlp.down_proj.weight", "value": 0.75}]),
        piece("a", 6, 9, scale=[{"filter": "mlp", "value": [1, 2]}]),
        piece("a", 9, 10, scale=[{"filter": "post_feedforward_layernorm", "value": "2e-1"}]),
    ]
    found = path_of_file(recipe_file(tmp_path, slices=slices))
    scales = [hop.scale for hop in found.hops]
    assert scales == [0.5, 1.0, 0.25, 1.0, 0.75, 1.0, 1.0, 1.5, 2.0, 0.2]
    assert found.scale_means == "factor on the MLP output of the hop"


def test_a_setting_without_a_match_is_passed_over(tmp_path: Path) -> None:
    slices = [piece("a", 0, 1, scale=[{"filter": "o_proj", "value": 3}]), piece("a", 1, 2, scale=2)]
    slices[0]["parameters"] = {"scale": [{"filter": "q_proj", "value": 4}]}
    found = path_of_file(recipe_file(tmp_path, slices=slices, parameters={"scale": 0.5}))
    assert [hop.scale for hop in found.hops] == [0.5, 2.0]


def test_scales_that_mergekit_lacks_count_too(tmp_path: Path) -> None:
    scales = [
        {"tensor": "model.layers.1.post_feedforward_layernorm.weight", "factor": 0.5, "offset": 1.0},
        {"tensor": "model.layers.0.input_layernorm.weight", "factor": 3.0, "offset": 1.0},
    ]
    slices = [piece("a", 3, 4), piece("a", 5, 6)]
    found = path_of_file(recipe_file(tmp_path, slices=slices, evomerge={"scales": scales}))
    assert found.pieces == ("A 3", "A 5 x0.5")


def test_a_recipe_that_a_search_wrote_tells_its_scales(tmp_path: Path, tiny_zoo: Path) -> None:
    """With `branch` the MLP of a hop carries the scale of the hop behind it."""
    one = str(tiny_zoo / "one")
    hops = [Hop(model=one, layer=layer, scale=scale) for layer, scale in ((0, 1.0), (2, 0.5), (3, 1.25))]
    recipe = path_recipe(
        hops, "branch", {one: anatomy_of(Checkpoint.open(tiny_zoo / "one"))}, dtype="bfloat16"
    )
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert path_of_file(tmp_path / "r.yml").pieces == ("A 0 x0.5", "A 2 x1.25", "A 3")


def test_of_several_recipes_the_one_without_a_name_is_shown(tmp_path: Path) -> None:
    first = {
        "name": "merged",
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 1}}],
    }
    final = {"merge_method": "passthrough", "slices": [piece("merged", 0, 2)]}
    file = tmp_path / "recipes.yml"
    file.write_text(yaml.safe_dump_all([first, final]))
    assert path_of_file(file).pieces == ("A 0-1",)
    file.write_text(yaml.safe_dump_all([final, final]))
    with pytest.raises(ConfigurationError, match="found 2 without"):
        path_of_file(file)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"merge_method": "linear", "slices": [piece("a", 0, 1)]}, "got linear$"),
        ({"models": [{"model": "a"}]}, "got passthrough of whole models"),
        ({"slices": [{"sources": [*piece("a", 0, 1)["sources"], *piece("b", 0, 1)["sources"]]}]}, "got 2"),
    ],
)
def test_a_recipe_without_a_path_is_refused(tmp_path: Path, recipe: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"this recipe has no path: .*{reason}"):
        path_of_file(recipe_file(tmp_path, **recipe))


def test_what_is_no_recipe_is_said_to_be_none(tmp_path: Path, tiny_zoo: Path) -> None:
    file = tmp_path / "experiment.yml"
    file.write_text("name: x\nobjectives: []\n")
    with pytest.raises(ConfigurationError, match="expected a recipe, which has a merge_method"):
        path_of_file(file)
    with pytest.raises(ConfigurationError, match="found nothing without"):
        path_of_file(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"merged by a passthrough recipe, .* expected evomistral, found llama"
    ):
        path_of_file(tiny_zoo / "one")


def test_a_merged_checkpoint_shows_the_recipe_it_carries(tmp_path: Path) -> None:
    recipe_file(tmp_path, slices=[piece("a", 1, 3)]).rename(tmp_path / "mergekit_config.yml")
    (tmp_path / "config.json").write_text("{}")
    assert path_of_file(tmp_path).pieces == ("A 1-2",)


def test_a_released_data_flow_checkpoint_shows_and_gives_its_path(tmp_path: Path, tiny_zoo: Path) -> None:
    state = load_file(tiny_zoo / "one" / "model.safetensors")
    state["model.input_layers"] = torch.tensor([0, 1, 3, 3], dtype=torch.int32)
    state["model.input_scales"] = torch.tensor([1.0, 1.0, 0.5, 0.75])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tiny_zoo / "one" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evomistral", "num_hops": 4}))
    found = path_of_file(tmp_path)
    assert found.pieces == ("A 0-1", "A 3 x0.5", "A 3 x0.75")
    assert found.depths == {str(tmp_path): 4}
    recipe = checkpoint_recipe(tmp_path)
    assert recipe.out_dtype == "bfloat16"
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert path_of_file(tmp_path / "r.yml").pieces == ("A 0", "A 1 x0.5", "A 3 x0.75", "A 3")


@pytest.mark.parametrize(
    ("name", "is_output"),
    [
        ("model.layers.3.mlp.down_proj.weight", True),
        ("down_proj", True),
        ("transformer.h.0.mlp.c_proj.bias", True),
        ("transformer.h.0.attn.c_proj.weight", False),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", True),
        ("gpt_neox.layers.0.attention.dense.weight", False),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("post_feedforward_layernorm", True),
        ("pre_feedforward_layernorm", False),
        ("post_attention_layernorm", False),
        (".mlp.", True),
        ("self_attn", False),
    ],
)
def test_names_of_what_mlps_add_to_the_stream_are_known(name: str, is_output: bool) -> None:
    assert is_mlp_output(name) is is_output
