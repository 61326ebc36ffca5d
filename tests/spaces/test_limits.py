"""Limits on the size of a merged model."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.checkpoints.reader import Checkpoint
from evomerge.spaces.data_flow_settings import PathSettings
from evomerge.spaces.limits import Limits, size_faults, size_of
from evomerge.spaces.steps import Step
from tests.merge.models import variant
from tests.spaces.paths import PAIR, pool, sources

SOURCES = sources(PAIR)  # math: 10 11 12 13, code: 20 21 22, 100 outside


def limits(**settings: int) -> Limits:
    return Limits(PathSettings(**settings), pool(), SOURCES)  # type: ignore[arg-type]


def steps(*layers: int, strengths: tuple[float, ...] = ()) -> list[Step]:
    """Steps from layer 0 to layer 3 over others."""
    inner = zip(layers, strengths or [0.0] * len(layers), strict=True)
    return [
        Step(layer=0, slot=0),
        *(Step(layer=layer, slot=9, strength=strength) for layer, strength in inner),
        Step(layer=3, slot=1),
    ]


def kept(found: list[Step]) -> list[int]:
    return [step.layer for step in found]


def test_without_limits_a_path_stays_as_it_is() -> None:
    path = steps(4, 5, 6, 6, 1)
    assert limits().repair(path) == path


def test_the_weakest_hops_leave_a_path_that_is_too_long() -> None:
    path = steps(4, 5, 6, 1, strengths=(0.3, 0.1, 0.9, 0.2))
    assert kept(limits(max_hops=5).repair(path)) == [0, 4, 6, 1, 3]
    assert kept(limits(max_hops=3).repair(path)) == [0, 6, 3]
    assert kept(limits(max_hops=2).repair(path)) == [0, 3]
    assert limits(max_hops=6).repair(path) == path


def test_of_equals_the_last_leave_first_but_never_the_very_last() -> None:
    assert kept(limits(max_hops=4).repair(steps(4, 5, 6, 1))) == [0, 4, 5, 3]


def test_parameters_are_those_of_every_hop_and_of_the_first_models_other_parts() -> None:
    path = steps(4, 5, 1)  # 100 + 10 + 20 + 21 + 11 + 13
    assert limits(max_parameters=175).repair(path) == path
    assert kept(limits(max_parameters=174).repair(path)) == [0, 4, 5, 3]
    assert kept(limits(max_parameters=163).repair(path)) == [0, 4, 3]
    assert kept(limits(max_parameters=123).repair(path)) == [0, 3]


def test_both_limits_hold() -> None:
    path = steps(4, 1, 1, 1)
    assert kept(limits(max_hops=5, max_parameters=156).repair(path)) == [0, 4, 1, 3]
    assert kept(limits(max_hops=4, max_parameters=199).repair(path)) == [0, 4, 1, 3]


def test_a_limit_below_the_shortest_path_is_a_fault() -> None:
    (fault,) = limits(max_parameters=122).faults()
    assert fault[0] == ("max_parameters",)
    assert fault[1].startswith("expected at least 123, ")
    assert fault[1].endswith("got 122")
    assert list(limits(max_parameters=123, max_hops=2).faults()) == []


def test_a_limit_on_parameters_needs_the_sizes_of_all_models() -> None:
    from dataclasses import replace

    unknown = replace(SOURCES, sizes={"/zoo/math": SOURCES.sizes["/zoo/math"]})
    (fault,) = size_faults(PathSettings(max_parameters=999), unknown)
    assert fault == (("max_parameters",), "the number of parameters is unknown of /zoo/code")
    assert list(size_faults(PathSettings(max_hops=9), unknown)) == []


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_a_model_are_counted_by_layer(tiny_zoo: Path, tmp_path: Path, tied: bool) -> None:
    folder = variant(tiny_zoo / "one", tmp_path / "model", tie_word_embeddings=tied)
    found = size_of(Checkpoint.open(folder))
    # Width 32, 48 inside the MLP, 2 of 4 heads for keys and values; a vocabulary of 64.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert found.layers == (layer,) * 4
    assert found.outside == (1 if tied else 2) * 64 * 32 + 32
