"""The joint space: merges on a path, scales in the weights of a linear merge, and faults."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.checkpoints.architecture import classify, layer_name
from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.anatomy import anatomy_of
from evomerge.merge.check import check_recipe
from evomerge.merge.plan import plan_merge
from evomerge.recipe import ConditionalValue, Recipe
from evomerge.records import Genome
from evomerge.spaces import SourceModels
from evomerge.spaces.folding import path_recipe
from evomerge.spaces.joint import JointSpace, _scaled
from evomerge.spaces.limits import size_of
from evomerge.spaces.path import Semantics
from tests.architectures import make_family
from tests.merge.zoo import assert_same, by_mergekit, merged, tensors
from tests.spaces.paths import faults, genomes, names, short, sources, space, start

LINEAR = """\
type: joint
merge_method: linear
parameters:
  weight: {low: -1, high: 2, start: 0.5}
"""
SCALED = LINEAR + "constants: {normalize: false}\nscales: {type: hop, low: -2, high: 2}\n"
GROUPS = """\
groups:
- {name: mlp, filters: [mlp]}
- {name: ends, filters: [embed, lm_head], depth: false}
- {name: rest}
"""
PAIR = {"one": 4, "two": 4}


def joint(text: str, of: SourceModels | None = None) -> JointSpace:
    found = space(text, of or sources(PAIR))
    assert isinstance(found, JointSpace)
    return found


def of_folder(zoo: Path, *, base: bool = False) -> SourceModels:
    models = tuple(f"{zoo}/{name}" for name in ("one", "two"))
    opened = {name: Checkpoint.open(Path(name)) for name in (*models, f"{zoo}/base")}
    depth = len(size_of(opened[models[0]]).layers)
    return SourceModels(
        models=models,
        base=f"{zoo}/base" if base else None,
        num_layers=depth,
        dtype="float32",
        depths=dict.fromkeys(opened, depth),
        anatomies={model: anatomy_of(opened[model]) for model in models},
        sizes={model: size_of(opened[model]) for model in models},
    )


def genome_of(found: JointSpace, **values: float) -> Genome:
    """A genome by the names of its dimensions, signs left out; indicators are off unless they are named."""
    signs = str.maketrans("[].", "___")
    plain = {name.translate(signs).replace("__", "_").strip("_"): name for name in names(found.dimensions)}
    genome = {name: -1.0 if name.startswith("use") else 1.0 for name in names(found.dimensions)}
    for name, value in values.items():
        genome[plain[name]] = value
    return tuple(genome.values())


# Dimensions and paths.


def test_numbers_of_the_merge_come_first_then_the_path_then_its_scales() -> None:
    found = joint(SCALED + "indicators: {repeats: 2}\n")
    assert names(found.dimensions) == [
        *("weight[one]", "weight[two]"),
        *("use[layer.1].0", "use[layer.2].0", *(f"use[layer.{layer}].1" for layer in range(4))),
        *("scale[layer.0].0", "scale[layer.1].0", "scale[layer.2].0"),
        *(f"scale[layer.{layer}].1" for layer in range(4)),
        "scale[layer.3].0",
    ]


def test_the_start_is_the_plain_merge_of_all_layers() -> None:
    found = joint(LINEAR + GROUPS + "depth: {blocks: 2}\n")
    assert short(found.hops(start(found))) == "one.0 one.1 one.2 one.3"
    parameter = space(
        (LINEAR + GROUPS).replace("type: joint", "type: parameter") + "depth: {blocks: 2}\n", sources(PAIR)
    )
    blocks = parameter.decode(start(parameter))
    recipe = found.decode(start(found))
    assert recipe.slices is not None
    assert blocks.slices is not None
    assert [piece.sources[0].layer_range for piece in recipe.slices] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for number, piece in enumerate(recipe.slices):
        assert [source.parameters for source in piece.sources] == [
            source.parameters for source in blocks.slices[number // 2].sources
        ]


def test_a_genome_by_hand_becomes_slices_with_all_sources() -> None:
    found = joint(LINEAR + "depth: {blocks: 3}\nindicators: {repeats: 2}\n")
    assert names(found.dimensions)[:6] == [
        f"weight[{name}].{block}" for name in ("one", "two") for block in (0, 1, 2)
    ]
    genome = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -1.0, 0.5, -1.0, 0.25, 1.0, 0.0)
    assert short(found.hops(genome)) == "one.0 one.2 one.1 one.2 one.3"

    def piece(layer: int, one: float, two: float) -> str:
        entries = (
            f"{{model: /zoo/{name}, layer_range: [{layer}, {layer + 1}], parameters: {{weight: {weight}}}}}"
            for name, weight in (("one", one), ("two", two))
        )
        return f"- sources: [{', '.join(entries)}]\n"

    # Layer 0, layer 1, and layers 2 and 3 are the blocks, as in the parameter space.
    pieces = [(0, 0.1, 0.4), (2, 0.3, 0.6), (1, 0.2, 0.5), (2, 0.3, 0.6), (3, 0.3, 0.6)]
    text = "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\nslices:\n"
    assert found.decode(genome) == Recipe.from_yaml(text + "".join(piece(*item) for item in pieces))


@pytest.mark.parametrize(("layers", "blocks"), [(4, 1), (4, 3), (4, 4), (7, 3), (7, 5)])
def test_blocks_have_the_layers_that_they_have_in_the_parameter_space(layers: int, blocks: int) -> None:
    of = sources({"one": layers, "two": layers})
    found = joint(LINEAR + f"depth: {{blocks: {blocks}}}\n", of)
    numbers = [number / 100 for number in range(2 * blocks)]
    recipe = found.decode((*numbers, *start(found)[2 * blocks :]))
    parameter = space(f"{LINEAR}depth: {{blocks: {blocks}}}\n".replace("joint", "parameter"), of)
    expected: list[object] = []
    for piece in parameter.decode(tuple(numbers)).slices or []:
        expected += [[source.parameters for source in piece.sources]] * piece.num_layers
    assert [[source.parameters for source in piece.sources] for piece in recipe.slices or []] == expected


def test_numbers_of_layers_off_the_path_have_no_effect() -> None:
    found = joint(SCALED + "depth: {blocks: 4}\nindicators: {repeats: 1}\n")
    genome = genome_of(found, use_layer_1=0.5, weight_one_2=0.25, weight_two_2=0.5, scale_layer_2=0.1)
    other = genome_of(found, use_layer_1=0.9, weight_one_2=0.75, weight_two_2=0.1, scale_layer_2=1.9)
    assert found.decode(genome) == found.decode(other)
    assert found.decode(genome) != found.decode(genome_of(found, use_layer_1=0.5, weight_one_1=0.25))


# Merged tensors.


def test_every_hop_is_the_merge_of_its_layer_and_the_ends_those_of_the_first_and_last_hop(
    tiny_zoo: Path,
) -> None:
    found = joint(LINEAR + "depth: {blocks: 4}\nindicators: {repeats: 2}\nconstants: {normalize: false}\n",
                  of_folder(tiny_zoo))  # fmt: skip
    weights = {layer: (0.1 * (layer + 1), 1 - 0.2 * layer) for layer in range(4)}
    numbers = {
        f"weight_{name}_{layer}": weights[layer][i]
        for layer in range(4)
        for i, name in enumerate(("one", "two"))
    }
    genome = genome_of(found, use_layer_2_0=1, use_layer_1_1=1, **numbers)
    one, two = tensors(tiny_zoo / "one"), tensors(tiny_zoo / "two")
    result = merged(found.decode(genome))
    path = [0, 2, 1, 3]
    assert max(role.layer or 0 for role in classify(result).values()) == 3

    def expected(name: str, layer: int) -> Tensor:
        return weights[layer][0] * one[name].float() + weights[layer][1] * two[name].float()

    for name, role in classify(result).items():
        layer = 0 if "embed" in name else 3 if role.layer is None else path[role.layer]
        source = name if role.layer is None else layer_name(role.template, layer)
        assert torch.allclose(result[name].float(), expected(source, layer), atol=1e-6), name


def test_a_method_with_a_base_merges_task_vectors_in_every_hop(tiny_zoo: Path) -> None:
    text = "type: joint\nmerge_method: task_arithmetic\nparameters: {weight: {low: 0, high: 1}}\n"
    found = joint(text + "indicators: {repeats: 1}\n", of_folder(tiny_zoo, base=True))
    result = merged(found.decode((0.25, 0.75, -1.0, 1.0)))
    base, one, two = (tensors(tiny_zoo / name) for name in ("base", "one", "two"))
    name = "model.layers.{}.mlp.up_proj.weight"
    for hop, layer in enumerate((0, 2, 3)):
        source = name.format(layer)
        about = base[source].float()
        change = 0.25 * (one[source].float() - about) + 0.75 * (two[source].float() - about)
        assert torch.allclose(result[name.format(hop)].float(), about + change, atol=1e-6)


def test_a_number_of_the_recipe_is_one_per_slice(tiny_zoo: Path) -> None:
    text = "type: joint\nmerge_method: slerp\nparameters: {t: {low: 0, high: 1}}\ndepth: {blocks: 2}\n"
    of = replace(of_folder(tiny_zoo, base=True), models=(f"{tiny_zoo}/one",))
    found = joint(text + "indicators: {repeats: 1}\n", of)
    recipe = found.decode((0.0, 1.0, 1.0, 1.0))
    assert check_recipe(recipe) == []
    result = merged(recipe)
    for layer, name in enumerate(["base", "base", "one", "one"]):
        tensor = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.allclose(result[tensor], tensors(tiny_zoo / name)[tensor].float(), atol=1e-6)


@pytest.mark.parametrize("more", ["", GROUPS])
@pytest.mark.parametrize("semantics", ["branch", "stream"])
def test_scales_multiply_the_merged_tensors_as_they_do_those_of_one_model(
    tiny_zoo: Path, semantics: Semantics, more: str
) -> None:
    of = of_folder(tiny_zoo)
    found = joint(SCALED + f"{more}semantics: {semantics}\nindicators: {{repeats: 1}}\n", of)
    genome = genome_of(
        found,
        use_layer_1=1,
        scale_layer_0=0.5,
        scale_layer_1=-1.5,
        scale_layer_3=0.75,
        **{f"weight_{name}": value for name, value in _WEIGHTS.items() if ("mlp" in name) == bool(more)},
        **({"weight_one_ends": 0.5, "weight_one_rest": 0.4, "weight_two_ends": 0.25} if more else {}),
    )
    recipe = found.decode(genome)
    assert check_recipe(recipe) == []
    plain = merged(found.decode(genome_of(found, **_without_scales(found, genome))))
    folded = path_recipe(found.hops(genome), semantics, of.anatomies, dtype="float32")
    sources_of = {model: Checkpoint.open(Path(model)) for model in of.models}
    factors = {
        tensor.name: tensor.values[0]["scale"] or 1.0 for tensor in plan_merge(folded, sources_of).tensors
    }
    assert len(set(factors.values())) > 2
    result = merged(recipe)
    assert sorted(result) == sorted(plain)
    for name, tensor in result.items():
        assert torch.allclose(tensor, factors[name] * plain[name], rtol=1e-5, atol=1e-7), name


def test_mergekit_merges_a_recipe_with_scales_to_the_same_tensors(tiny_zoo: Path, tmp_path: Path) -> None:
    found = joint(SCALED + GROUPS + "indicators: {repeats: 1}\n", of_folder(tiny_zoo))
    recipe = found.decode(
        genome_of(found, use_layer_2=1, weight_one_mlp=0.3, scale_layer_0=0.5, scale_layer_3=-1.5)
    )
    assert_same(merged(recipe), by_mergekit(recipe, tmp_path))


_WEIGHTS = {"one": 0.3, "two": 0.8, "one_mlp": 2.0, "two_mlp": 0.5}


def _without_scales(found: JointSpace, genome: Genome) -> dict[str, float]:
    signs = str.maketrans("[].", "___")
    return {
        name.translate(signs).replace("__", "_").strip("_"): value
        for name, value in zip(names(found.dimensions), genome, strict=True)
        if not name.startswith("scale")
    }


def test_scaled_norms_that_multiply_by_one_more_are_scaled_after_the_merge(tmp_path: Path) -> None:
    zoo = make_family(tmp_path, "Gemma2")
    found = joint(SCALED + "indicators: {repeats: 1}\n", of_folder(zoo))
    result = merged(found.decode(genome_of(found, weight_one=0.25, weight_two=0.5, scale_layer_2=-0.5)))
    one, two = tensors(zoo / "one"), tensors(zoo / "two")
    name = "model.layers.0.post_feedforward_layernorm.weight"
    expected = -0.5 * (1 + 0.25 * one[name] + 0.5 * two[name]) - 1
    assert torch.allclose(result[name], expected, atol=1e-6)
    other = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(result[other], 0.25 * one[other] + 0.5 * two[other], atol=1e-6)


def test_filters_join_only_tensors_of_one_weight_and_one_scale() -> None:
    weight = [{"value": 0.5, "filter": "mlp"}, {"value": 1.0}]
    scale = [ConditionalValue(value=2.0, filter="down"), ConditionalValue(value=0.5, filter="o_proj")]
    names_there = ["a.mlp.down", "a.mlp.up", "a.o_proj", "a.mlp.down_bias.x", "a.q_proj"]
    found = _scaled(weight, scale, names_there)
    values = {
        name: next(item["value"] for item in found if item.get("filter", "") in name) for name in names_there
    }
    assert values == {
        "a.mlp.down": 1.0,  # 0.5 * 2
        "a.mlp.down_bias.x": 1.0,
        "a.mlp.up": 0.5,
        "a.o_proj": 0.5,  # 1 * 0.5
        "a.q_proj": 1.0,
    }


def test_a_scaled_tensor_whose_name_is_a_part_of_another_leaves_the_other_alone() -> None:
    scale = [ConditionalValue(value=1.0, filter="down_bias"), ConditionalValue(value=3.0, filter="down")]
    found = _scaled([{"value": 0.25}], scale, ["mlp.down", "mlp.down_bias"])
    assert [next(item["value"] for item in found if item.get("filter", "") in name)
            for name in ("mlp.down", "mlp.down_bias")] == [0.75, 0.25]  # fmt: skip
    unscaled = [ConditionalValue(value=3.0, filter="x.mlp.down")]
    found = _scaled([{"value": 0.25}], unscaled, ["x.mlp.down", "mlp.down"])
    assert [next(item["value"] for item in found if item.get("filter", "") in name)
            for name in ("x.mlp.down", "mlp.down")] == [0.75, 0.25]  # fmt: skip


# Any genome.


@settings(max_examples=40, deadline=None)
@given(data=st.data(), semantics=st.sampled_from(["branch", "stream"]), is_tied=st.booleans())
def test_any_genome_is_a_recipe_within_the_limits(
    data: st.DataObject, semantics: Semantics, is_tied: bool
) -> None:
    more = data.draw(st.sampled_from(["", GROUPS, GROUPS + "depth: {blocks: 2}\n", "max_hops: 3\n"]))
    text = data.draw(st.sampled_from([LINEAR, SCALED + f"semantics: {semantics}\n"])) + more
    found = joint(text, sources(PAIR, tied=is_tied))
    genome = data.draw(genomes(found))
    hops = found.hops(genome)
    assert (hops[0].layer, hops[-1].layer) == (0, 3)
    assert len(hops) <= (3 if "max_hops" in text else math.inf)
    recipe = found.decode(genome)
    assert check_recipe(recipe) == []
    assert recipe == found.decode(genome)
    assert [piece.sources[0].layer_range[0] for piece in recipe.slices or []] == [hop.layer for hop in hops]
    assert all([source.model for source in piece.sources] == ["/zoo/one", "/zoo/two"]
               for piece in recipe.slices or [])  # fmt: skip


# Faults.


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LINEAR + "scales: {type: hop, low: 0, high: 2}\n", "s.yml:5: scales: a weighted average is divided"),
        (LINEAR + "indicators: {repeat: 2}\n", "s.yml:5: indicators.repeat: unknown key (did you mean 'repeats'?)"),
        (LINEAR + "depth: {smooth: 2}\n", "s.yml:5: depth.smooth: unknown key"),
        (LINEAR + "depth: {blocks: 5}\n", "s.yml:5: depth.blocks: expected at most the models' 4 layers, got 5"),
        (LINEAR + "max_parameters: 9\n", "s.yml:5: max_parameters: expected at least 123"),
        (LINEAR.replace("weight", "wieght"), "s.yml:4: parameters.wieght: linear has no number of this name"),
        (SCALED.replace("linear", "ties").replace("constants: {normalize: false}\n", "")
         .replace("parameters:\n", "parameters:\n  density: {low: 0.1, high: 1}\n"),
         "s.yml:6: scales: scales fold into the weights of a linear merge"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_faults_at_their_line(text: str, fault: str) -> None:
    found = faults(text, replace(sources(PAIR, base="base"), sizes=sources(PAIR).sizes))
    assert any(text.startswith(fault) for text in found)


def test_models_of_different_depth_are_a_fault() -> None:
    (found,) = faults(LINEAR, sources({"one": 4, "two": 3}))
    assert found.startswith(
        "s.yml:1: type: every hop merges one layer of all models, which differ in their number"
    )


def test_a_base_of_another_depth_is_a_fault_where_it_is_merged() -> None:
    of = sources(PAIR, base="base")
    of = replace(of, num_layers=5, depths={**of.depths, "/zoo/base": 5})
    text = LINEAR.replace("linear", "task_arithmetic")
    (found,) = faults(text, of)
    assert found.startswith("s.yml:1: type: every hop merges one layer of all models")
    assert "/zoo/base 5" in found


def test_models_of_one_layer_are_a_fault() -> None:
    (found,) = faults(LINEAR, sources({"one": 1, "two": 1}))
    assert found == "s.yml:1: type: a path starts and ends with different layers; the models have one"


def test_scales_need_to_know_the_layers() -> None:
    (found,) = faults(SCALED, replace(sources(PAIR), anatomies={}))
    assert found.startswith("s.yml:6: scales: needs to know what the layers are made of")
    assert joint(LINEAR, replace(sources(PAIR), anatomies={}, sizes={})).dimensions
