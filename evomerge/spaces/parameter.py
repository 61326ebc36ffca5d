"""The parameter space: the numbers of a merge method, per source model, tensor group and depth.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.1, searches weight and density per source model. Here a number can further be split by tensor
groups (name filters) and over depth, either in blocks of consecutive layers or as a gradient between
control points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome
from evomerge.spaces.base import Finding, SourceModels, check_length, refuse
from evomerge.spaces.method_numbers import MethodNumbers, if_any, method_faults
from evomerge.spaces.parameter_settings import ParameterSpaceSettings
from evomerge.yaml_file import Document


class ParameterSpace:
    """A parameter space over given source models; see the module's description."""

    def __init__(
        self, settings: ParameterSpaceSettings, sources: SourceModels, document: Document | None = None
    ) -> None:
        """Check the settings against the method and the models.

        Raises:
            ConfigurationError: Carries every fault found.
        """
        refuse(document, [*method_faults(settings, sources), *_depth_faults(settings, sources)])
        self._settings = settings
        self._sources = sources
        depth = settings.depth
        self._blocks = depth.blocks if depth else None
        positions = (depth.blocks or depth.smooth or 1) if depth else 1
        self._numbers = MethodNumbers(settings, sources, positions=positions)

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """The searched numbers, in the genome's order."""
        return self._numbers.dimensions

    def decode(self, genome: Genome) -> Recipe:
        """Turn a genome into its recipe, computed in float32 and written in the sources' own type."""
        check_length(genome, self.dimensions)
        recipe = self._numbers.head(self._sources.dtype)
        shared: dict[str, Any] = {}
        if self._blocks is None:
            recipe["models"] = [self._numbers.source(genome, model) for model in self._sources.models]
            shared = self._numbers.parameters(genome, None)
        else:
            recipe["slices"] = [self._slice(genome, block, self._blocks) for block in range(self._blocks)]
        recipe |= if_any({**self._settings.constants, **shared})
        return Recipe.from_dict(recipe)

    def _slice(self, genome: Genome, block: int, blocks: int) -> dict[str, Any]:
        layers = self._sources.num_layers
        span = [block * layers // blocks, (block + 1) * layers // blocks]
        sources = [self._numbers.source(genome, model, block) for model in self._sources.models]
        base = self._numbers.base
        if base is not None and base not in self._sources.models:
            sources.append({"model": base})
        return {
            "sources": [{**source, "layer_range": span} for source in sources],
            **if_any(self._numbers.parameters(genome, None, block)),
        }


def _depth_faults(settings: ParameterSpaceSettings, sources: SourceModels) -> Iterator[Finding]:
    blocks = settings.depth.blocks if settings.depth else None
    if blocks is not None and blocks > sources.num_layers:
        reason = f"expected at most the models' {sources.num_layers} layers, got {blocks}"
        yield ("depth", "blocks"), reason
