"""Paths by slots: the layers a slot offers, the start, and what choices mean."""

from __future__ import annotations

import pytest

from evomerge.records import Kind
from evomerge.spaces.data_flow_settings import PathGenome
from evomerge.spaces.slots import Slots, slot_faults
from evomerge.spaces.steps import Pool, Step
from tests.spaces.paths import names, pool


def slots(of: Pool | None = None, **settings: int) -> Slots:
    return Slots(PathGenome(type="path", **settings), of or pool())  # type: ignore[arg-type]


def start(found: Slots) -> list[int]:
    return [step.layer for step in found.steps([item.start for item in found.dimensions])]


def test_a_slot_offers_the_layers_near_its_depth_of_every_model() -> None:
    # Of 7 layers and of 4: layer 2 of the one is as deep as layer 1 of the other.
    found = slots(pool({"math": 7, "code": 4}), window=1)
    assert names(found.dimensions) == [f"layer.{slot}" for slot in range(1, 6)]
    second = found.dimensions[1]
    assert second.kind is Kind.CATEGORICAL
    assert second.choices == ("skip", "math.1", "math.2", "math.3", "code.0", "code.1", "code.2")
    assert (second.low, second.high, second.start) == (0, 6, 2)
    assert found.dimensions[4].choices == ("skip", "math.4", "math.5", "math.6", "code.2", "code.3")


def test_without_a_window_a_slot_offers_the_layer_of_its_own_depth() -> None:
    found = slots(pool({"math": 5, "code": 5}), window=0)
    assert [item.choices for item in found.dimensions] == [
        ("skip", f"math.{layer}", f"code.{layer}") for layer in (1, 2, 3)
    ]


def test_choices_are_steps_and_skips() -> None:
    found = slots(window=1)
    assert found.dimensions[0].choices == ("skip", "math.0", "math.1", "math.2", "code.0", "code.1", "code.2")
    assert found.steps([5, 1]) == [
        Step(layer=0, slot=0),
        Step(layer=5, slot=1),
        Step(layer=1, slot=2),
        Step(layer=3, slot=3),
    ]
    assert found.steps([0, 6]) == [Step(layer=0, slot=0), Step(layer=6, slot=2), Step(layer=3, slot=3)]
    assert found.slots == (".0", ".1", ".2", ".3")
    assert found.max_steps == 4


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("depth", [3, 4, 9])
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 11])
def test_the_start_is_the_first_model_however_many_slots_there_are(
    window: int, depth: int, extra: int
) -> None:
    found = slots(pool({"math": depth, "code": 6}), window=window, slots=depth - 2 + extra)
    assert len(found.dimensions) == depth - 2 + extra
    assert start(found) == list(range(depth))


def test_slots_lie_between_the_first_and_the_last_layer() -> None:
    found = slots(pool({"math": 9, "code": 5}, first=2, last=6), window=0)
    assert [item.choices[1:] for item in found.dimensions] == [
        ("math.3", "code.2"),
        ("math.4", "code.2"),
        ("math.5", "code.3"),
    ]
    assert start(found) == [2, 3, 4, 5, 6]


def test_fewer_slots_than_layers_cannot_start_as_the_first_model() -> None:
    (fault,) = slot_faults(PathGenome(type="path", slots=1), pool())
    assert fault[0] == ("genome", "slots")
    assert fault[1].startswith("expected at least the 2 layers of math between the first and the last layer")
    assert list(slot_faults(PathGenome(type="path", slots=2), pool())) == []


def test_without_layers_between_the_ends_the_number_of_slots_must_be_said() -> None:
    (fault,) = slot_faults(PathGenome(type="path"), pool({"math": 2, "code": 9}))
    assert fault == (
        ("genome", "slots"),
        "math has no layers between the first and the last one; say how many slots there are",
    )
    assert list(slot_faults(PathGenome(type="path", slots=3), pool({"math": 2, "code": 9}))) == []
