"""The data-flow space: the paths and recipes that genomes stand for, and its faults."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merge.check import check_recipe
from evomerge.recipe import Recipe
from evomerge.spaces import needs_anatomies
from evomerge.spaces.data_flow import DataFlowSpace
from evomerge.spaces.data_flow_settings import DataFlowSettings, IndicatorGenome
from evomerge.spaces.folding import path_recipe
from evomerge.spaces.path import Hop, Semantics
from tests.spaces.paths import (
    PAIR,
    anatomy,
    document,
    faults,
    genomes,
    names,
    short,
    sources,
    space,
    start,
)

INDICATOR = "type: data_flow\ngenome: {type: indicator}\n"
PATH = "type: data_flow\ngenome: {type: path}\n"
BLOCKS = "type: data_flow\ngenome: {type: blocks, count: 2}\n"
HOP = "scales: {type: hop, low: 0.5, high: 2}\n"
SCALES = [
    "",
    HOP,
    "scales: {type: matrix, low: -1, high: 1}\n",
    "scales: {type: network, low: -3, high: 3}\n",
]


def flow(text: str, **kind: Any) -> DataFlowSpace:
    found = space(text, sources(PAIR, **kind))
    assert isinstance(found, DataFlowSpace)
    return found


def path(found: DataFlowSpace, genome: list[float]) -> str:
    return short(found.hops(tuple(genome)))


# The start.


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("genome", [INDICATOR, PATH, BLOCKS])
def test_every_space_starts_as_the_first_model_itself(genome: str, scales: str) -> None:
    found = flow(genome + scales.replace("-1, high: 1}", "0, high: 1}"))
    assert short(found.hops(start(found))) == "math.0 math.1 math.2 math.3"
    recipe = found.decode(start(found))
    assert recipe == Recipe.from_yaml("""
        merge_method: passthrough
        slices:
        - sources: [{model: /zoo/math, layer_range: [0, 1]}]
        - sources: [{model: /zoo/math, layer_range: [1, 2]}]
        - sources: [{model: /zoo/math, layer_range: [2, 3]}]
        - sources: [{model: /zoo/math, layer_range: [3, 4]}]
        dtype: float32
        out_dtype: bfloat16
        """)


# Genomes by hand.


def test_a_genome_of_indicators_by_hand() -> None:
    found = flow("type: data_flow\ngenome: {type: indicator, repeats: 2}\n")
    genome = [0.5, -1, 1, -0.25, 0.125, -1, -1, 0.25, -1, 0.75, 0, -1]
    assert path(found, genome) == "math.0 math.1 code.0 code.2 math.2 code.0 math.3"


def test_a_genome_of_choices_with_scales_by_hand() -> None:
    found = flow(PATH + HOP)
    assert names(found.dimensions) == ["layer.1", "layer.2", "scale.0", "scale.1", "scale.2", "scale.3"]
    assert found.dimensions[1].choices == (
        "skip",
        *(f"math.{i}" for i in range(4)),
        "code.0",
        "code.1",
        "code.2",
    )
    assert path(found, [7, 0, 0.5, 2, 1.25, 0.75]) == "math.0*0.5 code.2*2 math.3*0.75"
    assert path(found, [0, 1, 1, 2, 1.25, 1]) == "math.0 math.0*1.25 math.3"


def test_a_genome_of_spans_with_scales_by_hand() -> None:
    found = flow(BLOCKS + HOP)
    genome = [1, 1, 2, 0, 1, 1, 1, 0.5, 1.5, 2]
    assert path(found, genome) == "math.0 code.1*0.5 code.2 math.1*1.5 math.3*2"


def test_a_genome_of_a_matrix_by_hand() -> None:
    found = flow(PATH + "scales: {type: matrix, low: 0, high: 2}\n")
    genome = [1.0] * len(found.dimensions)
    genome[:2] = [5, 6]
    for name, value in [
        ("scale[-> math.0]", 0.5),
        ("scale[math.0 -> code.0]", 0.25),
        ("scale[code.0 -> code.1]", 1.5),
        ("scale[math.1 -> math.3]", 0.0),
    ]:
        genome[names(found.dimensions).index(name)] = value
    assert path(found, genome) == "math.0*0.5 code.0*0.25 code.1*1.5 math.3"


@pytest.mark.parametrize("semantics", ["branch", "stream"])
def test_scales_are_folded_into_the_recipe_as_the_semantics_say(semantics: Semantics) -> None:
    found = flow(PATH + HOP + f"semantics: {semantics}\n")
    assert found.semantics == semantics
    hops = [
        Hop(model="/zoo/math", layer=0, scale=0.5),
        Hop(model="/zoo/code", layer=2, scale=2.0),
        Hop(model="/zoo/math", layer=3, scale=0.75),
    ]
    expected = path_recipe(hops, semantics, sources(PAIR).anatomies, dtype="bfloat16")
    assert found.decode((7.0, 0.0, 0.5, 2.0, 1.25, 0.75)) == expected


def test_the_ends_of_the_path_can_be_other_layers_of_the_first_model() -> None:
    found = flow(INDICATOR + "first_layer: 1\nlast_layer: -2\n")
    assert path(found, [-1.0] * len(found.dimensions)) == "math.1 math.2"
    assert path(found, [*[1.0] * 2, *[-1.0] * (len(found.dimensions) - 2)]) == "math.1 math.0 math.3 math.2"


def test_a_path_of_one_model_alone() -> None:
    found = space("type: data_flow\ngenome: {type: indicator, repeats: 1}\n", sources({"math": 4}))
    assert names(found.dimensions) == ["use[math.1]", "use[math.2]"]


def test_a_base_that_is_no_source_gives_no_layers() -> None:
    with_base = space(INDICATOR, sources(PAIR, base="base"))
    assert names(with_base.dimensions) == names(flow(INDICATOR).dimensions)


def test_limits_shorten_the_path() -> None:
    found = flow(PATH + "max_hops: 3\n")
    assert path(found, [5, 6]) == "math.0 code.0 math.3"
    assert path(flow(PATH + "max_parameters: 143\n"), [2, 6]) == "math.0 math.1 math.3"


def test_a_genome_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 numbers, got 3"):
        flow(PATH).hops((0.0, 0.0, 0.0))


def test_settings_can_be_made_without_a_file() -> None:
    made = DataFlowSettings(type="data_flow", genome=IndicatorGenome(type="indicator", repeats=1))
    assert (
        DataFlowSpace(made, sources(PAIR)).dimensions
        == flow("type: data_flow\ngenome: {type: indicator, repeats: 1}\n").dimensions
    )


# Any genome.

_GENOME = st.sampled_from(
    [
        "{type: indicator, repeats: 1}",
        "{type: indicator, repeats: 3, start_unused: 0}",
        "{type: path, window: 1}",
        "{type: path, slots: 9, window: 0}",
        "{type: blocks, count: 3}",
        "{type: blocks, count: 1, max_length: 9}",
    ]
)
_SCALES = st.sampled_from(
    [
        "none",
        "{type: hop, low: -2, high: 2}",
        "{type: matrix, low: 0, high: 900}",
        "{type: network, low: -9, high: 9}",
    ]
)
_LIMITS = st.sampled_from(
    ["", "max_hops: 2\n", "max_hops: 6\n", "max_parameters: 160\n", "max_hops: 5\nmax_parameters: 180\n"]
)
_ENDS = st.sampled_from([(0, 3), (1, 3), (-4, 2)])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tied=st.booleans())
def test_any_genome_is_a_path_with_the_fixed_ends_within_the_limits(data: st.DataObject, tied: bool) -> None:
    semantics = data.draw(st.sampled_from(["branch", "stream"]))
    first, last = data.draw(_ENDS)
    text = f"type: data_flow\ngenome: {data.draw(_GENOME)}\nscales: {data.draw(_SCALES)}\n"
    text += f"semantics: {semantics}\n{data.draw(_LIMITS)}first_layer: {first}\nlast_layer: {last}\n"
    found = flow(text, tied=tied)
    genome = data.draw(genomes(found))
    hops = found.hops(genome)
    assert (hops[0].model, hops[0].layer) == ("/zoo/math", first % 4)
    assert (hops[-1].model, hops[-1].layer) == ("/zoo/math", last)
    sizes = sources(PAIR).sizes
    assert all(0 <= hop.layer < len(sizes[hop.model].layers) for hop in hops)
    limits = found._settings
    assert len(hops) <= (limits.max_hops or math.inf)
    parameters = 100 + sum(sizes[hop.model].layers[hop.layer] for hop in hops)
    assert parameters <= (limits.max_parameters or math.inf)
    assert all(math.isfinite(hop.scale) for hop in hops)
    recipe = found.decode(genome)
    assert check_recipe(recipe) == []
    assert recipe == found.decode(genome)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


# Faults.


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("genome: indicator", "genome: expected a mapping such as {type: indicator} whose type is one of indicator, "
         "path, blocks, got 'indicator'"),
        ("genome: {type: indicators}", "got 'indicators' (did you mean 'indicator'?)"),
        ("genome: {repeats: 3}", "whose type is one of indicator, path, blocks, got None"),
        ("genome: {type: indicator, repeats: 0}", "genome.repeats: input should be greater than or equal to 1"),
        ("genome: {type: indicator, start: 0}", "genome.start: input should be greater than 0"),
        ("genome: {type: indicator, start_unused: 1}", "genome.start_unused: input should be less than or"),
        ("genome: {type: indicator, window: 1}", "genome.window: unknown key; known keys: repeats, start, "
         "start_unused, type"),
        ("genome: {type: path, slots: 1}", "genome.slots: expected at least the 2 layers of math between"),
        ("genome: {type: path, window: -1}", "genome.window: input should be greater than or equal to 0"),
        ("genome: {type: blocks}", "genome.count: missing"),
        ("genome: {type: blocks, count: 1, max_length: 1}", "genome.max_length: expected at least 2, so that"),
    ],
)  # fmt: skip
def test_genomes_that_cannot_be_are_faults_at_their_line(text: str, fault: str) -> None:
    (found,) = faults(f"type: data_flow\n{text}\n")
    assert found.startswith("s.yml:2: genome")
    assert fault in found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("scales: {type: hops, low: 0, high: 1}", "scales: expected a mapping such as {type: hop} whose type is one "
         "of hop, matrix, network, got 'hops' (did you mean 'hop'?)"),
        ("scales: 1", "scales: expected a mapping such as {type: hop}"),
        ("scales: {type: hop, low: 0}", "scales.high: missing"),
        ("scales: {type: hop, low: 0, high: 0.5}", "scales: expected start between 0 and 0.5, got 1"),
        ("scales: {type: hop, low: 0, high: .inf}", "scales.high: input should be less than or equal to 1000000"),
        ("scales: {type: matrix, low: 0, high: 1, min_scale: 0}", "scales.min_scale: input should be greater than 0"),
        ("scales: {type: network, hiden: 3}", "scales.hiden: unknown key (did you mean 'hidden'?)"),
        ("semantics: residual", "semantics: input should be 'branch' or 'stream', got 'residual'"),
        ("max_hops: 1", "max_hops: input should be greater than or equal to 2"),
        ("max_parameters: 122", "max_parameters: expected at least 123, the parameters of the first"),
        ("max_parameters: 7B", "max_parameters: input should be a valid integer, got '7B'"),
        ("first_layer: 4", "first_layer: expected one of the 4 layers of /zoo/math, from -4 to 3, got 4"),
        ("last_layer: -5", "last_layer: expected one of the 4 layers of /zoo/math, from -4 to 3, got -5"),
        ("last_layer: 0", "last_layer: expected a layer behind first_layer, which is 0 of /zoo/math, got 0"),
        ("layers: 3", "layers: unknown key"),
    ],
)  # fmt: skip
def test_other_settings_that_cannot_be_are_faults_at_their_line(text: str, fault: str) -> None:
    (found,) = faults(INDICATOR + text + "\n")
    assert found.startswith("s.yml:3: ")
    assert fault in found


def test_models_without_anatomy_are_a_fault() -> None:
    unknown = replace(sources(PAIR), anatomies={"/zoo/math": anatomy(4)})
    assert faults(INDICATOR, unknown) == [
        "s.yml:1: type: needs to know what the layers are made of, which is unknown of /zoo/code"
    ]


def test_a_first_model_of_one_layer_is_a_fault() -> None:
    (found,) = faults(INDICATOR, sources({"math": 1, "code": 5}))
    assert found.startswith(
        "s.yml:1: type: a path starts and ends with different layers of /zoo/math, which has 1"
    )


def test_nothing_to_search_is_a_fault() -> None:
    (found,) = faults("type: data_flow\ngenome: {type: indicator, repeats: 1}\n", sources({"math": 2}))
    assert found.startswith("s.yml:2: genome: leaves nothing to search")


def test_scales_that_the_models_cannot_carry_are_a_fault() -> None:
    found = faults(INDICATOR + HOP + "semantics: stream\n", sources(PAIR, norms=False))
    assert len(found) == 2
    assert found[0].startswith("s.yml:3: scales: /zoo/math: cannot be folded into weights")
    assert found[1].startswith("s.yml:3: scales: /zoo/code: cannot be folded into weights")


def test_the_space_says_that_it_needs_anatomies() -> None:
    assert needs_anatomies(document(INDICATOR))
    joint = "type: joint\nmerge_method: linear\nparameters: {weight: {low: 0, high: 1}}\n"
    assert not needs_anatomies(document(joint))
    assert needs_anatomies(document(joint + HOP))
