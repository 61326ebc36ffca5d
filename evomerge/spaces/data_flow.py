"""The data-flow space: which layers of the source models a token passes, in which order, and their scales.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.2. Weights stay as they are. Layers come from all source models; embedding, head and tokenizer, and
the layers that start and end the path, from the first. How a genome stands for a path is a choice of three:
`indicators.py`, the paper's, `slots.py` and `blocks.py`. All start at the first source model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome
from evomerge.spaces.base import Finding, SourceModels, check_length, refuse, short_names
from evomerge.spaces.blocks import Blocks, block_faults
from evomerge.spaces.data_flow_settings import BlocksGenome, DataFlowSettings, IndicatorGenome, PathGenome
from evomerge.spaces.folding import path_recipe
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.limits import Limits, size_faults
from evomerge.spaces.path import Hop, Semantics
from evomerge.spaces.path_genes import PathGenes, folding_faults
from evomerge.spaces.slots import Slots, slot_faults
from evomerge.spaces.steps import Encoding, Pool
from evomerge.yaml_file import Document


class DataFlowSpace:
    """A data-flow space over given source models; see the module's description."""

    def __init__(
        self, settings: DataFlowSettings, sources: SourceModels, document: Document | None = None
    ) -> None:
        """Check the settings against the models.

        Raises:
            ConfigurationError: Carries every fault found.
        """
        refuse(document, [*_source_faults(sources), *size_faults(settings, sources)])
        first, last = (_resolve(place, sources) for place in (settings.first_layer, settings.last_layer))
        refuse(document, list(_end_faults(settings, first, last, sources)))
        labels = short_names(sources.models)
        pool = Pool(
            models=tuple(labels[model] for model in sources.models),
            depths=tuple(sources.depths[model] for model in sources.models),
            first=first,
            last=last,
        )
        limits = Limits(settings, pool, sources)
        self._settings = settings
        self._sources = sources
        self._layers = [(sources.models[model], layer) for model, layer in pool.layers]
        found = [*_genome_faults(settings, pool), *limits.faults()]
        refuse(document, [*found, *folding_faults(settings, pool, self._layers, sources.anatomies)])
        self._genes = PathGenes(settings, pool, _encoding(settings, pool), limits)
        if all(dimension.low == dimension.high for dimension in self.dimensions):
            reason = (
                "leaves nothing to search: there are no layers but the first and the last; name more models"
            )
            refuse(document, [(("genome",), reason)])

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """What is searched, in the genome's order."""
        return self._genes.dimensions

    @property
    def semantics(self) -> Semantics:
        """What the scale of a hop multiplies."""
        return self._settings.semantics

    def hops(self, genome: Genome) -> tuple[Hop, ...]:
        """The path that a genome stands for."""
        check_length(genome, self.dimensions)
        return tuple(
            Hop(model=self._layers[layer][0], layer=self._layers[layer][1], scale=scale)
            for layer, scale in self._genes.hops(genome)
        )

    def decode(self, genome: Genome) -> Recipe:
        """Turn a genome into the recipe of its path, written in the sources' own type."""
        return path_recipe(
            self.hops(genome), self.semantics, self._sources.anatomies, dtype=self._sources.dtype
        )


def _encoding(settings: DataFlowSettings, pool: Pool) -> Encoding:
    match settings.genome:
        case IndicatorGenome():
            return Indicators(settings.genome, pool)
        case PathGenome():
            return Slots(settings.genome, pool)
        case BlocksGenome():
            return Blocks(settings.genome, pool)


def _resolve(place: int, sources: SourceModels) -> int:
    """A layer of the first source model, counted from its end if negative."""
    return place if place >= 0 else place + sources.depths[sources.models[0]]


def _source_faults(sources: SourceModels) -> Iterator[Finding]:
    unknown = [model for model in sources.models if model not in sources.anatomies]
    if unknown:
        reason = f"needs to know what the layers are made of, which is unknown of {', '.join(unknown)}"
        yield ("type",), reason
    first = sources.models[0]
    if sources.depths[first] < 2:
        reason = f"a path starts and ends with different layers of {first}, which has {sources.depths[first]}"
        yield ("type",), f"{reason}; name another model first"


def _end_faults(
    settings: DataFlowSettings, first: int, last: int, sources: SourceModels
) -> Iterator[Finding]:
    model = sources.models[0]
    depth = sources.depths[model]
    ends = {"first_layer": (settings.first_layer, first), "last_layer": (settings.last_layer, last)}
    found = [
        ((name,), f"expected one of the {depth} layers of {model}, from {-depth} to {depth - 1}, got {asked}")
        for name, (asked, resolved) in ends.items()
        if not 0 <= resolved < depth
    ]
    yield from found
    if not found and first >= last:
        yield (
            ("last_layer",),
            f"expected a layer behind first_layer, which is {first} of {model}, got {last}",
        )


def _genome_faults(settings: DataFlowSettings, pool: Pool) -> Iterator[Finding]:
    if isinstance(settings.genome, PathGenome):
        yield from slot_faults(settings.genome, pool)
    elif isinstance(settings.genome, BlocksGenome):
        yield from block_faults(settings.genome, pool)
