"""Sizes of candidates: what the space really gives, and the largest there is."""

from __future__ import annotations

import itertools
import statistics

import pytest

from evomerge.plan.candidates import Candidates, survey
from evomerge.prepare import PreparedRun
from evomerge.records import Kind
from tests.plan.conftest import Prepare

FLOW = """\
search_space: {{type: data_flow, genome: {genome}{more}}}
search: {{algorithm: {algorithm}, evaluations: 10, population: 6}}"""

SPACES = {
    "indicator": ("{type: indicator, repeats: 1}", ""),
    "path": ("{type: path, window: 1}", ""),
    "blocks": ("{type: blocks, count: 2}", ""),
    "few hops": ("{type: indicator, repeats: 1}", ", max_hops: 6"),
}


def flow(name: str, algorithm: str = "cma-es") -> str:
    genome, more = SPACES[name]
    return FLOW.format(genome=genome, more=more, algorithm=algorithm)


def surveyed(prepared: PreparedRun) -> Candidates:
    return survey(prepared.stages[0], prepared.experiment.searches[0], prepared.checkpoints)[0]


def by_hand(prepared: PreparedRun, hops: int) -> int:
    """Parameters of a path of layers of the tiny zoo, which are all of one size."""
    tensors = next(iter(prepared.checkpoints.values())).tensors
    numel = {name: info.shape[0] * (info.shape[1] if info.shape[1:] else 1) for name, info in tensors.items()}
    layer = sum(count for name, count in numel.items() if ".layers.0." in name)
    return hops * layer + sum(count for name, count in numel.items() if ".layers." not in name)


@pytest.mark.parametrize("name", SPACES)
def test_the_largest_path_is_the_largest_of_all(name: str, prepared: Prepare) -> None:
    run = prepared(flow(name))
    space = run.stages[0].space
    corners = []
    for dimension in space.dimensions:
        if dimension.kind is Kind.CONTINUOUS:
            corners.append([dimension.low, dimension.high])
        else:
            corners.append([float(value) for value in range(int(dimension.low), int(dimension.high) + 1)])
    most = max(len(space.hops(genome)) for genome in itertools.islice(itertools.product(*corners), 60_000))
    found = surveyed(run).entry
    assert found.hops is not None
    assert found.hops.most == most
    assert found.parameters.most == by_hand(run, most)


@pytest.mark.parametrize("algorithm", ["cma-es", "catcma", "random"])
def test_the_first_generation_is_the_searchers_own(algorithm: str, prepared: Prepare) -> None:
    run = prepared(flow("path", algorithm))
    stage = run.stages[0]
    lengths = [len(stage.space.hops(genome)) for genome in stage.new_searcher().ask()]
    found = surveyed(run).entry
    assert found.hops is not None
    assert found.hops.first_generation == statistics.mean(lengths)
    assert found.hops.first_generation_most == max(lengths)
    assert found.hops.start == 4
    assert found.parameters.start == by_hand(run, 4)


def test_a_merge_is_as_large_as_its_sources(prepared: Prepare) -> None:
    run = prepared()
    found = surveyed(run)
    assert found.entry.hops is None
    assert {found.entry.parameters.start, found.entry.parameters.most} == {by_hand(run, 4)}
    assert found.layers.most == 4
    assert not found.is_path
    assert found.num_models == 3
    assert found.entry.dimensions == {"continuous": 4, "integer": 0, "categorical": 0}


def test_dimensions_are_counted_by_kind(prepared: Prepare) -> None:
    found = surveyed(prepared(flow("blocks"))).entry
    assert found.dimensions == {"continuous": 0, "integer": 4, "categorical": 2}
    assert (found.population, found.generations, found.evaluations) == (6, 2, 10)


def test_a_path_needs_no_statistics_and_ties_needs_histograms(prepared: Prepare) -> None:
    path, ties = surveyed(prepared(flow("path"))), surveyed(prepared())
    assert path.is_path
    assert path.statistics == ()
    assert {statistic.kind for statistic in ties.statistics} == {"histogram"}
    assert len(ties.statistics) == 2 * len(next(iter(prepared().checkpoints.values())).tensors)
