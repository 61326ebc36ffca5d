"""The parameter space: its dimensions, what a genome means for every tensor, and its faults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigurationError
from evomerge.merge.check import check_recipe
from evomerge.merge.plan import TensorPlan, plan_merge
from evomerge.recipe import Recipe
from evomerge.records import Dimension
from evomerge.spaces import SearchSpace, SourceModels, build_space, read_space
from evomerge.yaml_file import Document, parse_yaml
from tests.merge.zoo import models as opened

DARE = """\
type: parameter
merge_method: dare_ties
parameters:
  density: {low: 0.1, high: 1}
  weight: {low: -1, high: 1, start: 0.5}
"""
GROUPS = """\
groups:
- {name: mlp, filters: [mlp, ffn]}
- {name: ends, filters: [embed, lm_head], depth: false}
- {name: rest}
"""


def sources(zoo: Path | str = "/zoo", *, names: str = "one two", base: str | None = "base") -> SourceModels:
    return SourceModels(
        models=tuple(f"{zoo}/{name}" for name in names.split()),
        base=f"{zoo}/{base}" if base else None,
        num_layers=4,
        dtype="bfloat16",
    )


def document(text: str) -> Document:
    (found,) = parse_yaml(text, file="s.yml")
    return found


def space(text: str, of: SourceModels | None = None) -> SearchSpace:
    return build_space(document(text), of or sources())


def names(found: SearchSpace) -> list[str]:
    return [dimension.name for dimension in found.dimensions]


def faults(text: str, of: SourceModels | None = None) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        space(text, of)
    return [str(fault) for fault in caught.value.faults]


def plans(found: SearchSpace, genome: list[float]) -> dict[str, TensorPlan]:
    """The plan of every tensor, decoded from a genome."""
    recipe = found.decode(tuple(genome))
    assert check_recipe(recipe) == []
    return {tensor.name: tensor for tensor in plan_merge(recipe, opened(recipe)).tensors}


def weights(plan: TensorPlan, key: str = "weight") -> list[float]:
    return [values[key] for values in plan.values if key in values]


# Dimensions.


def test_dimensions_follow_the_methods_parameters_then_models_then_groups_then_depth() -> None:
    assert names(space(DARE)) == ["weight[one]", "weight[two]", "density[one]", "density[two]"]
    found = names(space(DARE + GROUPS + "depth: {smooth: 2}"))
    assert found[:6] == [
        "weight[one].mlp.0",
        "weight[one].mlp.1",
        "weight[one].ends",
        "weight[one].rest.0",
        "weight[one].rest.1",
        "weight[two].mlp.0",
    ]
    assert len(found) == 2 * 2 * 5


def test_ranges_start_in_the_middle_unless_told_otherwise() -> None:
    weight, _, density, _ = space(DARE).dimensions
    assert weight == Dimension(name="weight[one]", low=-1, high=1, start=0.5)
    assert density == Dimension(name="density[one]", low=0.1, high=1, start=0.55)


def test_logarithmic_ranges_start_at_the_geometric_middle() -> None:
    found = space(DARE.replace("high: 1}", "high: 0.9, scale: log}")).dimensions[2]
    assert found.log
    assert found.start == pytest.approx(math.sqrt(0.1 * 0.9))


def test_a_source_may_have_a_range_of_its_own() -> None:
    found = space(DARE + "sources:\n  /zoo/two:\n    weight: {low: 0, high: 2}\n")
    assert [(item.low, item.high) for item in found.dimensions[:2]] == [(-1, 1), (0, 2)]


def test_parameters_of_the_recipe_are_searched_once() -> None:
    assert names(space(DARE + "  lambda: {low: 0.5, high: 2}\n"))[-1] == "lambda"


def test_a_base_among_the_models_has_no_task_vector_to_weigh() -> None:
    assert names(space(DARE, sources(names="base one"))) == ["weight[one]", "density[one]"]
    linear = "type: parameter\nmerge_method: linear\nparameters: {weight: {low: 0.1, high: 1}}\n"
    assert names(space(linear, sources(names="base one"))) == ["weight[base]", "weight[one]"]


# Decoding.


def test_a_genome_becomes_a_recipe_in_float32_with_everything_said() -> None:
    found = space(DARE + "constants: {normalize: true, lambda: 2}\nseed: 7\n")
    assert found.decode((0.25, -0.5, 0.125, 1.0)) == Recipe.from_yaml("""
        merge_method: dare_ties
        models:
        - {model: /zoo/one, parameters: {weight: 0.25, density: 0.125}}
        - {model: /zoo/two, parameters: {weight: -0.5, density: 1.0}}
        base_model: /zoo/base
        parameters: {normalize: true, lambda: 2.0}
        dtype: float32
        out_dtype: bfloat16
        evomerge: {seed: 7}
        """)


def test_a_genome_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 numbers, got 3"):
        space(DARE).decode((0.1, 0.2, 0.3))


def test_a_method_without_base_gets_none(tiny_zoo: Path) -> None:
    text = "type: parameter\nmerge_method: linear\nparameters: {weight: {low: 0.1, high: 1}}\n"
    found = space(text, sources(tiny_zoo))
    assert found.decode((0.5, 0.5)).base_model is None
    assert weights(plans(found, [0.25, 0.75])["model.norm.weight"]) == [0.25, 0.75]


@pytest.mark.parametrize("more", ["", "depth: {blocks: 2}\n"])
def test_a_method_that_can_use_a_base_gets_the_experiments(tiny_zoo: Path, more: str) -> None:
    text = "type: parameter\nmerge_method: nuslerp\nparameters: {weight: {low: 0, high: 1}}\n" + more
    given = sources(tiny_zoo)
    found = space(text, given)
    recipe = found.decode(tuple(dimension.start for dimension in found.dimensions))
    assert recipe.base_model == given.base
    check_recipe(recipe)
    without = space(text, sources(tiny_zoo, base=None))
    recipe = without.decode(tuple(dimension.start for dimension in without.dimensions))
    assert recipe.base_model is None
    assert len(without.dimensions) == len(found.dimensions)


def test_groups_give_every_tensor_the_number_of_its_first_group(tiny_zoo: Path) -> None:
    found = space(DARE + GROUPS, sources(tiny_zoo))
    of_one, of_two = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    by_name = plans(found, [*of_one, *of_two, *[0.5] * 6])
    assert weights(by_name["model.layers.3.mlp.up_proj.weight"]) == [0.1, 0.4]
    assert weights(by_name["model.embed_tokens.weight"]) == [0.2, 0.5]
    assert weights(by_name["lm_head.weight"]) == [0.2, 0.5]
    assert weights(by_name["model.layers.0.self_attn.q_proj.weight"]) == [0.3, 0.6]
    assert weights(by_name["model.norm.weight"]) == [0.3, 0.6]


def test_blocks_give_consecutive_layers_their_own_numbers(tiny_zoo: Path) -> None:
    found = space(DARE + GROUPS + "depth: {blocks: 3}", sources(tiny_zoo, names="one"))
    assert names(found)[:7] == [
        f"weight[one].{name}" for name in ("mlp.0", "mlp.1", "mlp.2", "ends", "rest.0", "rest.1", "rest.2")
    ]
    by_name = plans(found, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, *[0.5] * 7])
    mlp = [weights(by_name[f"model.layers.{layer}.mlp.up_proj.weight"]) for layer in range(4)]
    assert mlp == [[0.1], [0.2], [0.3], [0.3]]
    norm = [weights(by_name[f"model.layers.{layer}.input_layernorm.weight"]) for layer in range(4)]
    assert norm == [[0.5], [0.6], [0.7], [0.7]]
    assert weights(by_name["model.embed_tokens.weight"]) == weights(by_name["lm_head.weight"]) == [0.4]
    assert weights(by_name["model.norm.weight"]) == [0.7]  # behind the layers: the last block's
    assert [name for _, name in by_name["model.layers.3.mlp.up_proj.weight"].inputs] == (
        ["model.layers.3.mlp.up_proj.weight"] * 2
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_blocks_cover_every_layer_once(tiny_zoo: Path, blocks: int) -> None:
    found = space(DARE + f"depth: {{blocks: {blocks}}}", sources(tiny_zoo, names="one"))
    recipe = found.decode(tuple(dimension.start for dimension in found.dimensions))
    assert recipe.slices is not None
    spans = [source.layer_range for piece in recipe.slices for source in piece.sources[:1]]
    assert [layer for first, end in spans for layer in range(first, end)] == [0, 1, 2, 3]
    assert len(spans) == blocks


def test_smooth_numbers_are_interpolated_over_the_layers(tiny_zoo: Path) -> None:
    found = space(DARE + "depth: {smooth: 3}", sources(tiny_zoo, names="one"))
    by_name = plans(found, [0.0, 0.9, 0.3, 0.5, 0.5, 0.5])
    weight = [weights(by_name[f"model.layers.{layer}.mlp.up_proj.weight"])[0] for layer in range(4)]
    assert weight == pytest.approx([0.0, 0.6, 0.7, 0.3])
    assert weights(by_name["model.embed_tokens.weight"]) == [0.0]


@pytest.mark.parametrize("depth", ["", "depth: {blocks: 2}\n", "depth: {smooth: 2}\n"])
def test_parameters_of_the_recipe_vary_like_any_other(tiny_zoo: Path, depth: str) -> None:
    text = "type: parameter\nmerge_method: slerp\nparameters: {t: {low: 0, high: 1}}\n" + GROUPS + depth
    found = space(text, sources(tiny_zoo, names="one"))
    genome = [0.1, 0.9, 0.5, 0.2, 0.8] if depth else [0.1, 0.5, 0.2]
    by_name = plans(found, genome)
    mlp = [by_name[f"model.layers.{layer}.mlp.up_proj.weight"].shared["t"] for layer in (0, 3)]
    assert mlp == ([0.1, 0.9] if depth else [0.1, 0.1])
    assert by_name["lm_head.weight"].shared["t"] == 0.5
    assert by_name["lm_head.weight"].base == 1


def test_constants_reach_every_model(tiny_zoo: Path) -> None:
    text = (
        DARE.replace("  density: {low: 0.1, high: 1}\n", "") + "constants: {density: 0.25, rescale: false}\n"
    )
    plan = plans(space(text, sources(tiny_zoo)), [0.1, 0.2])["lm_head.weight"]
    assert weights(plan, "density") == [0.25, 0.25]
    assert plan.shared["rescale"] is False


# Faults.


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("type: parameter", "type: [a]", "s.yml:1: type: expected one of parameter, data_flow, joint, got ['a']"),
        ("type: parameter", "type: paramter", "s.yml:1: type: expected one of parameter, data_flow, joint, got "
         "'paramter' (did you mean 'parameter'?)"),
        ("dare_ties", "dare", "s.yml:2: merge_method: unknown method 'dare' (did you mean 'dare_ties'?)"),
        ("high: 1}", "hihg: 1}", "s.yml:4: parameters.density.h"),
        ("low: -1, high: 1", "low: 2, high: 1", "s.yml:5: parameters.weight: expected low <= high, got low 2"),
        ("start: 0.5", "start: 2", "s.yml:5: parameters.weight: expected start between -1 and 1, got 2"),
        ("start: 0.5", "scale: log", "s.yml:5: parameters.weight: scale log needs low > 0, got -1"),
        ("high: 1, s", "high: .inf, s", "s.yml:5: parameters.weight.high: input should be a finite number"),
        ("low: 0.1", "low: 0", "s.yml:4: parameters.density.low: expected a number in (0, 1], got 0.0"),
        ("low: 0.1, high: 1", "low: 0.1, high: 1.1", "s.yml:4: parameters.density.high: expected a number in (0, 1]"),
        ("density:", "densty:", "s.yml:4: parameters.densty: dare_ties has no number of this name (did"),
        ("density:", "normalize:", "s.yml:4: parameters.normalize: dare_ties has no number of this name"),
        ("weight:", "lambda:", "s.yml:3: parameters: dare_ties requires 'weight'"),
    ],
)  # fmt: skip
def test_ranges_that_cannot_be_are_faults_at_their_line(old: str, new: str, fault: str) -> None:
    assert old in DARE
    found = faults(DARE.replace(old, new))
    assert found[0].startswith(fault)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("depth: {blocks: 5}", "depth.blocks: expected at most the models' 4 layers, got 5"),
        ("depth: {blocks: 0}", "depth.blocks: input should be greater than or equal to 1"),
        ("depth: {smooth: 1}", "depth.smooth: input should be greater than or equal to 2"),
        ("depth: {smooth: 2, blocks: 2}", "depth: expected exactly one of 'blocks' and 'smooth'"),
        ("depth: {}", "depth: expected exactly one of 'blocks' and 'smooth'"),
        ("sources: {/zoo/too: {}}", "sources./zoo/too: not one of the experiment's models (did"),
        ("sources: {/zoo/two: {lambda: {low: 0, high: 1}}}", "two.lambda: lambda is one number for the whole"),
        ("sources: {/zoo/two: {wieght: {low: 0, high: 1}}}", "sources./zoo/two.wieght: dare_ties has no number"),
        ("constants: {weight: 1}", "constants.weight: both searched and constant; keep one"),
        ("constants: {normalise: true}", "constants.normalise: dare_ties has no such parameter (did you mean"),
        ("constants: {normalize: 0.5}", "constants.normalize: expected true or false, got 0.5"),
        ("constants: {lambda: true}", "constants.lambda: expected a number, got True"),
        ("constants: {lambda: .nan}", "constants.lambda: expected a number, got nan"),
        ("constants: {lambda: high}", "constants.lambda: expected a number, true or false, got 'high'"),
        ("groups: [{name: a}, {name: b}]", "groups: only the last group may go without filters, 'a' has none"),
        ("groups: [{name: a, filters: [mlp]}]", "groups: the last group must have no filters"),
        ("groups: [{name: a, filters: [mlp]}, {name: a}]", "groups: names must differ, got a, a"),
        ("groups: []", "groups: list should have at least 1 item"),
        ("seed: -1", "seed: input should be greater than or equal to 0"),
        ("seed: 9223372036854775808", "seed: input should be less than"),
    ],
)  # fmt: skip
def test_other_settings_that_cannot_be_are_faults(more: str, fault: str) -> None:
    (found,) = faults(DARE + more)
    assert fault in found
    assert found.startswith(("s.yml:6: ", "s.yml:1: groups: "))


def test_a_constant_outside_its_range_is_a_fault() -> None:
    text = DARE.replace("  density: {low: 0.1, high: 1}\n", "") + "constants:\n  density: 0\n"
    assert faults(text) == ["s.yml:6: constants.density: expected a number in (0, 1], got 0.0"]


def test_a_range_per_source_needs_the_parameter_to_be_searched() -> None:
    constant = DARE.replace("  density: {low: 0.1, high: 1}\n", "")
    (found,) = faults(constant + "sources:\n  /zoo/two:\n    density: {low: 0.5, high: 1}\n")
    assert found == "s.yml:7: sources./zoo/two.density: not searched; add it to 'parameters' as well"


def test_the_models_must_suit_the_method() -> None:
    (found,) = faults(DARE, sources(base=None))
    assert found == "s.yml:2: merge_method: dare_ties needs the experiment to name a base_model"
    slerp = "type: parameter\nmerge_method: slerp\nparameters: {t: {low: 0, high: 1}}\n"
    (found,) = faults(slerp)
    assert found.endswith("slerp takes 1 model besides the base; the experiment has 2")
    assert faults(slerp, sources(names="base")) != []
    assert names(space(slerp, sources(names="one base"))) == ["t"]


def test_every_fault_comes_at_once() -> None:
    text = (
        DARE.replace("low: 0.1", "low: 0").replace("weight:", "wieght:")
        + "constants: {x: 1}\ndepth: {blocks: 9}\n"
    )
    assert len(faults(text, sources(base=None))) == 6


@pytest.mark.parametrize("data", [None, [], "text", {}])
def test_what_is_no_space_is_refused(data: Any) -> None:
    with pytest.raises(ConfigurationError):
        read_space(Document(data=data))
