"""Paths by blocks: the numbers of a span and what they mean."""

from __future__ import annotations

import pytest

from evomerge.records import Dimension, Kind
from evomerge.spaces.blocks import Blocks, block_faults
from evomerge.spaces.data_flow_settings import BlocksGenome
from evomerge.spaces.steps import Pool, Step
from tests.spaces.paths import pool


def blocks(count: int, of: Pool | None = None, max_length: int | None = None) -> Blocks:
    return Blocks(BlocksGenome(type="blocks", count=count, max_length=max_length), of or pool())


def layers(found: Blocks, genes: list[float]) -> list[int]:
    return [step.layer for step in found.steps(genes)]


def test_a_span_has_a_model_a_first_layer_and_a_length() -> None:
    source, first, length = blocks(1).dimensions
    assert source == Dimension(
        name="source.1", low=0, high=1, start=0, kind=Kind.CATEGORICAL, choices=("math", "code")
    )
    assert first == Dimension(name="first.1", low=0, high=3, start=1, kind=Kind.INTEGER)
    assert length == Dimension(name="length.1", low=0, high=4, start=2, kind=Kind.INTEGER)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 9])
def test_the_start_partitions_the_first_model(count: int) -> None:
    found = blocks(count, pool({"math": 7, "code": 3}))
    starts = [item.start for item in found.dimensions]
    assert layers(found, starts) == list(range(7))
    lengths = starts[2::3]
    assert max(lengths) - min(lengths) <= 1
    assert all(item.low <= item.start <= item.high for item in found.dimensions)


def test_spans_follow_each_other_and_those_of_length_zero_are_absent() -> None:
    found = blocks(3)
    genes = [1, 1, 2, 0, 3, 0, 0, 0, 1]
    assert found.steps([float(gene) for gene in genes]) == [
        Step(layer=0, slot=0),
        Step(layer=5, slot=1),
        Step(layer=6, slot=None),
        Step(layer=0, slot=3),
        Step(layer=3, slot=4),
    ]
    assert found.slots == (".0", ".1", ".2", ".3", ".4")


def test_a_span_is_cut_off_at_the_end_of_its_model() -> None:
    found = blocks(1, max_length=9)
    assert layers(found, [1, 1, 9]) == [0, 5, 6, 3]
    assert layers(found, [1, 3, 2]) == [0, 6, 3]  # code has 3 layers: its last one is the closest
    assert layers(found, [0, 0, 9]) == [0, 0, 1, 2, 3, 3]
    assert found.max_steps == 11


def test_the_longest_span_is_twice_the_start_unless_told_otherwise() -> None:
    assert [item.high for item in blocks(2, pool({"math": 9})).dimensions[2::3]] == [8, 8]
    assert [item.high for item in blocks(2, pool({"math": 9}), 5).dimensions[2::3]] == [5, 5]
    assert [item.high for item in blocks(2, pool({"math": 2})).dimensions[2::3]] == [1, 1]


def test_spans_too_short_for_the_start_are_a_fault() -> None:
    settings = BlocksGenome(type="blocks", count=2, max_length=3)
    (fault,) = block_faults(settings, pool({"math": 9}))
    assert fault[0] == ("genome", "max_length")
    assert fault[1].startswith("expected at least 4, so that 2 spans can start as the 7 layers of math")
    assert list(block_faults(settings, pool({"math": 8}))) == []
