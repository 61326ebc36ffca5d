"""How large the candidates of a search are: layers, parameters, and the statistics they need.

The first generation that the searcher proposes stands for the others. The largest candidate of a space of
paths is found by trying: every dimension at its highest value, then each whole number and choice in turn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from evomerge.checkpoints.reader import Checkpoint
from evomerge.experiment import StageSettings
from evomerge.merge.execute import prepare_tensor
from evomerge.merge.plan import plan_merge
from evomerge.plan.header_bank import HeaderBank, Statistic
from evomerge.plan.models import num_parameters
from evomerge.plan.records import Sizes, StageEntry
from evomerge.records import Genome, Kind
from evomerge.report.path_map import PathSpace
from evomerge.spaces.base import ModelSize
from evomerge.spaces.limits import size_of
from evomerge.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates of one search.

    Attributes:
        entry: What the plan says of them.
        statistics: Statistics of the sources that one of them needs.
        num_models: Models that are merged, the base counted.
        is_path: Whether their weights are those of the sources, only put in another order.
        layers: Number of their layers.
    """

    entry: StageEntry
    statistics: tuple[Statistic, ...]
    num_models: int
    is_path: bool
    layers: Sizes


def survey(
    stage: Stage, settings: StageSettings, checkpoints: Mapping[str, Checkpoint]
) -> tuple[Candidates, Checkpoint]:
    """Look at the candidates of a search.

    Args:
        stage: The search.
        settings: Its settings, resolved.
        checkpoints: Model as its recipes name it -> its checkpoint, or one that stands in for it.

    Returns:
        The candidates, and what stands in for the winner in later searches.
    """
    searcher = stage.new_searcher()
    genomes = searcher.ask()
    start = tuple(dimension.start for dimension in stage.space.dimensions)
    plan = plan_merge(stage.space.decode(genomes[0]), checkpoints)
    bank = HeaderBank(checkpoints)
    for tensor in plan.tensors:
        prepare_tensor(tensor, bank)
    donor = checkpoints[plan.donor]
    hops, parameters = _sizes(stage, genomes, start, checkpoints, donor)
    kinds = Counter(dimension.kind for dimension in stage.space.dimensions)
    space = settings.search_space
    assert isinstance(space, dict), "resolved"
    entry = StageEntry(
        name=stage.name,
        space=space["type"],
        dimensions={kind.value: kinds[kind] for kind in Kind},
        algorithm=settings.search.algorithm,
        population=searcher.population,
        generations=math.ceil(stage.evaluations / searcher.population),
        evaluations=stage.evaluations,
        hops=hops,
        parameters=parameters,
    )
    models = {model for tensor in plan.tensors for model, _ in tensor.inputs}
    candidates = Candidates(
        entry=entry,
        statistics=tuple(bank.asked.values()),
        num_models=len(models),
        is_path=plan.is_path,
        layers=hops or _all_same(plan.num_layers),
    )
    return candidates, donor


def _sizes(
    stage: Stage,
    genomes: list[Genome],
    start: Genome,
    checkpoints: Mapping[str, Checkpoint],
    donor: Checkpoint,
) -> tuple[Sizes | None, Sizes]:
    """Hops, where there are any, and parameters of the candidates."""
    space = stage.space
    if not isinstance(space, PathSpace):
        count = num_parameters(size_of(donor))
        return None, _all_same(count)
    known: dict[str, ModelSize] = {}

    def sizes(genome: Genome) -> tuple[int, int]:
        hops = space.hops(genome)
        for hop in hops:
            if hop.model not in known:
                known[hop.model] = size_of(checkpoints[hop.model])
        # Embedding and head are those of the model that starts and ends the path.
        outside = known[hops[0].model].outside
        return outside + sum(known[hop.model].layers[hop.layer] for hop in hops), len(hops)

    largest = tuple(dimension.high for dimension in space.dimensions)
    most = sizes(largest)
    for position, value in _alternatives(stage):
        changed = (*largest[:position], value, *largest[position + 1 :])
        found = sizes(changed)
        if found > most:
            largest, most = changed, found
    first = [sizes(genome) for genome in genomes]
    at_start = sizes(start)
    parameters, hops = (
        Sizes(
            start=at_start[column],
            first_generation=sum(found[column] for found in first) / len(first),
            first_generation_most=max(found[column] for found in first),
            most=max(most[column], *(found[column] for found in (at_start, *first))),
        )
        for column in (0, 1)
    )
    return hops, parameters


def _all_same(number: int) -> Sizes:
    return Sizes(start=number, first_generation=number, first_generation_most=number, most=number)


def _alternatives(stage: Stage) -> Iterator[tuple[int, float]]:
    """Other values of the whole numbers and choices, each twice, as one may make room for another."""
    for _ in range(2):
        for position, dimension in enumerate(stage.space.dimensions):
            if dimension.kind is Kind.CATEGORICAL:
                yield from ((position, float(choice)) for choice in range(len(dimension.choices)))
            elif dimension.kind is Kind.INTEGER:
                yield position, dimension.low
                yield position, dimension.high
