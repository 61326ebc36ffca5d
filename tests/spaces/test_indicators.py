"""Paths by indicators: what is searched, and which layers a genome takes."""

from __future__ import annotations

from evomerge.spaces.data_flow_settings import IndicatorSettings
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.steps import Pool, Step
from tests.spaces.paths import names, pool


def indicators(of: Pool | None = None, **settings: float) -> Indicators:
    return Indicators(IndicatorSettings(**settings), of or pool())  # type: ignore[arg-type]


def test_all_slots_but_the_two_fixed_ones_are_searched_in_the_models_order() -> None:
    found = indicators(repeats=2)
    assert names(found.dimensions) == [
        *("use[math.1].0", "use[math.2].0", "use[code.0].0", "use[code.1].0", "use[code.2].0"),
        *("use[math.0].1", "use[math.1].1", "use[math.2].1", "use[math.3].1"),
        *("use[code.0].1", "use[code.1].1", "use[code.2].1"),
    ]
    assert {(item.low, item.high) for item in found.dimensions} == {(-1.0, 1.0)}
    assert found.max_steps == len(found.slots) == len(found.dimensions) + 2 == 14
    assert (found.slots[0], found.slots[-1]) == ("[math.0].0", "[math.3].0")


def test_names_say_no_repetition_where_there_is_one() -> None:
    assert names(indicators(repeats=1).dimensions)[:2] == ["use[math.1]", "use[math.2]"]


def test_a_layer_is_on_the_path_where_its_indicator_is_above_zero() -> None:
    found = indicators(repeats=2)
    genes = [0.5, 0.0, 1.0, -0.25, 0.125, 0.25, -1, -0.0, 1e-300, 0.75, -1, -1]
    assert found.steps(genes) == [
        Step(layer=0, slot=0),
        Step(layer=1, slot=1, strength=0.5),
        Step(layer=4, slot=3, strength=1.0),
        Step(layer=6, slot=5, strength=0.125),
        Step(layer=0, slot=6, strength=0.25),
        Step(layer=3, slot=9, strength=1e-300),
        Step(layer=4, slot=10, strength=0.75),
        Step(layer=3, slot=13),
    ]


def test_the_start_is_the_first_model_as_far_from_change_either_way() -> None:
    found = indicators(repeats=3, start=0.25)
    assert [item.start for item in found.dimensions] == [0.25, 0.25, *[-0.25] * 17]
    assert [step.layer for step in found.steps([item.start for item in found.dimensions])] == [0, 1, 2, 3]


def test_unused_layers_can_start_at_zero_as_in_the_paper() -> None:
    found = indicators(repeats=1, start_unused=0)
    assert [item.start for item in found.dimensions] == [0.2, 0.2, 0, 0, 0]


def test_with_other_ends_the_first_models_other_layers_start_unused() -> None:
    found = indicators(pool({"math": 5}, first=1, last=3), repeats=1)
    assert names(found.dimensions) == ["use[math.0]", "use[math.2]", "use[math.4]"]
    assert [item.start for item in found.dimensions] == [-0.2, 0.2, -0.2]
    assert [step.layer for step in found.steps([1, 1, 1])] == [1, 0, 2, 4, 3]
