"""Genes of paths: layers and scales together, within what weights can carry."""

from __future__ import annotations

import math

import pytest

from evomerge.spaces.data_flow_settings import HopScaleSettings, IndicatorSettings, PathSettings
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.limits import Limits
from evomerge.spaces.path import Semantics
from evomerge.spaces.path_genes import MAX_PRODUCT, PathGenes, folding_faults
from tests.spaces.paths import pool, sources

LONG = {"math": 60}


def genes_of(semantics: Semantics = "branch", *, depth: int = 4, max_hops: int | None = None) -> PathGenes:
    settings = PathSettings(
        scales=HopScaleSettings(type="hop", low=-9, high=9), semantics=semantics, max_hops=max_hops
    )
    of = pool({"math": depth})
    limits = Limits(settings, of, sources({"math": depth}))
    return PathGenes(settings, of, Indicators(IndicatorSettings(repeats=1), of), limits)


def scales(found: PathGenes, values: list[float]) -> list[float]:
    """The scales of a path through all layers."""
    return [scale for _, scale in found.hops([*[1.0] * (len(values) - 2), *values])]


def test_genes_are_those_of_the_path_then_those_of_its_scales() -> None:
    found = genes_of()
    assert [item.name for item in found.dimensions] == [
        *("use[math.1]", "use[math.2]"),
        *("scale[math.0]", "scale[math.1]", "scale[math.2]", "scale[math.3]"),
    ]
    assert found.hops([-1, 1, 0.5, 0.25, 2, 1.5]) == [(0, 0.5), (2, 2), (3, 1.5)]


def test_hops_that_a_limit_takes_off_the_path_take_their_scales_with_them() -> None:
    assert genes_of(max_hops=3).hops([0.5, 0.25, 1, 2, 3, 4]) == [(0, 1), (1, 2), (3, 4)]


def test_a_branch_may_be_switched_off_but_not_the_embedding() -> None:
    assert scales(genes_of(), [0.0, 0.0, -0.001, 1e-40]) == [0.01, 0.0, -0.001, 0.0]
    assert scales(genes_of(), [-0.005, 1, 1, 1]) == [-0.01, 1, 1, 1]


def test_a_stream_cannot_be_switched_off() -> None:
    assert scales(genes_of("stream"), [0.0, -0.0, -0.001, 0.5]) == [0.01, -0.01, -0.01, 0.5]


@pytest.mark.parametrize("size", [0.02, 0.5, 2.0, 9.0])
def test_scales_of_a_stream_stop_where_their_product_leaves_float32(size: float) -> None:
    found = scales(genes_of("stream", depth=60), [(-1) ** hop * size for hop in range(60)])
    product = 1.0
    for hop, scale in enumerate(found):
        product *= scale
        assert abs(product) * (1 + 1e-12) >= 1 / MAX_PRODUCT
        assert abs(product) <= MAX_PRODUCT * (1 + 1e-12)
        assert math.copysign(1, scale) == (-1) ** hop
    assert abs(product) == pytest.approx(MAX_PRODUCT if size > 1 else 1 / MAX_PRODUCT)
    assert found[:5] == [(-1) ** hop * size for hop in range(5)]
    assert abs(found[-1]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("semantics", "kind", "fault"),
    [
        ("branch", {}, ""),
        ("stream", {}, ""),
        ("branch", {"tied": True}, ""),
        ("stream", {"norms": False}, "its attention branch, whose input norm has no weights"),
        ("branch", {"norms": False, "tied": True}, "/zoo/math has no final norm with weights"),
        ("branch", {"norms": False}, ""),
    ],
)
def test_scales_that_a_model_cannot_carry_are_a_fault(
    semantics: Semantics, kind: dict[str, bool], fault: str
) -> None:
    depths = {"math": 3, "code": 2}
    settings = PathSettings(scales=HopScaleSettings(type="hop", low=0, high=2), semantics=semantics)
    of = sources(depths, **kind)
    layers = [(of.models[model], layer) for model, layer in pool(depths).layers]
    found = list(folding_faults(settings, pool(depths), layers, of.anatomies))
    assert bool(found) == bool(fault)
    assert all(place == ("scales",) and fault in reason for place, reason in found)
    assert list(folding_faults(PathSettings(), pool(depths), layers, of.anatomies)) == []
