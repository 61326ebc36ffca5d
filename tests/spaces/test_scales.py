"""The scales of the steps of a path."""

from __future__ import annotations

import math

import pytest

from evomerge.spaces.blocks import Blocks
from evomerge.spaces.data_flow_settings import (
    BlocksGenome,
    HopScaleSettings,
    IndicatorSettings,
    MatrixScaleSettings,
    NetworkScaleSettings,
)
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.scales import HopScales, MatrixScales, NetworkScales, build_scales
from evomerge.spaces.steps import Step
from tests.spaces.paths import names, pool

ENCODING = Indicators(IndicatorSettings(repeats=1), pool({"math": 3, "code": 1}))
POOL = pool({"math": 3, "code": 1})


def steps(*layers: int) -> list[Step]:
    return [Step(layer=layer, slot=None) for layer in layers]


def test_without_scales_every_step_has_one() -> None:
    found = build_scales("none", POOL, ENCODING)
    assert found.dimensions == ()
    assert found.values((), steps(0, 1, 2)) == [1, 1, 1]


def test_every_slot_has_a_scale_that_starts_at_one() -> None:
    found = HopScales(HopScaleSettings(type="hop", low=0.5, high=2, scale="log"), ENCODING)
    assert names(found.dimensions) == ["scale[math.0]", "scale[math.1]", "scale[code.0]", "scale[math.2]"]
    assert {(item.low, item.high, item.start, item.log) for item in found.dimensions} == {(0.5, 2, 1, True)}
    path = ENCODING.steps([-1, 1])
    assert found.values([0.5, 0.75, 1.25, 1.5], path) == [0.5, 1.25, 1.5]


def test_in_a_span_only_the_way_in_is_scaled() -> None:
    encoding = Blocks(BlocksGenome(type="blocks", count=1), POOL)
    found = HopScales(HopScaleSettings(type="hop", low=0, high=2), encoding)
    assert names(found.dimensions) == ["scale.0", "scale.1", "scale.2"]
    path = encoding.steps([0, 0, 2])
    assert [step.layer for step in path] == [0, 0, 1, 2]
    assert found.values([0.5, 0.75, 1.5], path) == [0.5, 0.75, 1, 1.5]


def test_the_matrix_has_a_scale_per_pair_of_layers_and_one_for_the_first_hop() -> None:
    found = MatrixScales(MatrixScaleSettings(type="matrix", low=0, high=99, start=2), POOL)
    assert len(found.dimensions) == 17
    assert names(found.dimensions)[:3] == [
        "scale[-> math.0]",
        "scale[math.0 -> math.0]",
        "scale[math.0 -> math.1]",
    ]
    assert names(found.dimensions)[-2] == "scale[code.0 -> math.2]"
    assert {item.start for item in found.dimensions} == {2}
    numbered = [float(number) for number in range(17)]
    assert found.values(numbered, steps(0, 3, 3, 1, 2)) == [0, 4, 16, 14, 7]
    for place, (i, j) in enumerate([(0, 3), (3, 3), (3, 1), (1, 2)], start=1):
        index = int(found.values(numbered, steps(0, 3, 3, 1, 2))[place])
        assert names(found.dimensions)[index] == f"scale[{POOL.labels[i]} -> {POOL.labels[j]}]"


def test_the_network_starts_with_one_everywhere() -> None:
    found = NetworkScales(NetworkScaleSettings(type="network", hidden=3), POOL, ENCODING)
    assert len(found.dimensions) == 16
    assert {(item.low, item.high, item.start) for item in found.dimensions} == {(-1, 1, 0)}
    assert found.values([item.start for item in found.dimensions], steps(0, 1, 3, 2)) == [1, 1, 1, 1]


def test_the_network_sees_both_layers_and_the_step() -> None:
    found = NetworkScales(NetworkScaleSettings(type="network", hidden=2), POOL, ENCODING)
    assert names(found.dimensions) == [
        *(f"scale.{unit}.{part}" for unit in (0, 1) for part in ("from", "to", "step", "bias", "out")),
        "scale.bias",
    ]
    theta = [0.5, -0.25, 0.75, 0.1, 2.0, -1.0, 0.3, 0.2, -0.4, 0.5, 0.05]

    def expected(i: float, j: float, t: float) -> float:
        one = 2.0 * math.tanh(0.5 * i - 0.25 * j + 0.75 * t + 0.1)
        return 1.05 + one + 0.5 * math.tanh(-1.0 * i + 0.3 * j + 0.2 * t - 0.4)

    # M = 4 layers and T = 4 steps; the embedding is layer 0 of 4.
    assert found.values(theta, steps(0, 3, 2)) == pytest.approx(
        [expected(0, 1 / 4, 0), expected(1 / 4, 1, 1 / 4), expected(1, 3 / 4, 2 / 4)], rel=1e-12
    )
