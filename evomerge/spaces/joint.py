"""The joint space: the numbers of a merge and a path through the merged layers, in one genome.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187)
searches weights first and the path afterwards; here both move together. The models share one depth L. Slots
are the layers 0 to L - 1 in sequence, repeated, with an indicator each as in `indicators.py`; every hop is
the merge of that layer of all models. Numbers that no hop on the path uses have no effect.

Scales fold into the weights of a linear merge, which scale its tensors; no other method offers such numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evomerge.checkpoints.architecture import before_layers
from evomerge.merge.anatomy import Anatomy
from evomerge.merge.methods import METHODS
from evomerge.recipe import ConditionalValue, Recipe, Setting, evaluate
from evomerge.records import Dimension, Genome
from evomerge.spaces.base import Finding, SourceModels, check_length, refuse
from evomerge.spaces.folding import filters, path_recipe
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.joint_settings import JointSettings
from evomerge.spaces.limits import Limits, size_faults
from evomerge.spaces.method_numbers import MethodNumbers, base_of, if_any, method_faults
from evomerge.spaces.path import Hop, Semantics
from evomerge.spaces.path_genes import PathGenes, folding_faults
from evomerge.spaces.steps import Pool
from evomerge.yaml_file import Document


class JointSpace:
    """A joint space over given source models; see the module's description."""

    def __init__(
        self, settings: JointSettings, sources: SourceModels, document: Document | None = None
    ) -> None:
        """Check the settings against the method and the models.

        Raises:
            ConfigurationError: Carries every fault found.
        """
        found = [*method_faults(settings, sources), *_depth_faults(settings, sources)]
        refuse(document, [*found, *_scale_faults(settings, sources), *size_faults(settings, sources)])
        self._settings = settings
        self._sources = sources
        depth = sources.depths[sources.models[0]]
        pool = Pool(models=("layer",), depths=(depth,), first=0, last=depth - 1)
        limits = Limits(settings, pool, sources)
        layers = [(sources.models[0], layer) for _, layer in pool.layers]
        refuse(document, [*limits.faults(), *folding_faults(settings, pool, layers, sources.anatomies)])
        self._depth = depth
        self._num_blocks = settings.depth.blocks if settings.depth else 1
        self._numbers = MethodNumbers(settings, sources, positions=self._num_blocks)
        self._genes = PathGenes(settings, pool, Indicators(settings.indicators, pool), limits)
        self._dimensions = (*self._numbers.dimensions, *self._genes.dimensions)

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """What is searched, in the genome's order: the numbers of the merge, the path, its scales."""
        return self._dimensions

    @property
    def semantics(self) -> Semantics:
        """What the scale of a hop multiplies."""
        return self._settings.semantics

    def hops(self, genome: Genome) -> tuple[Hop, ...]:
        """The path that a genome stands for; the first source model stands for the merge of all."""
        check_length(genome, self.dimensions)
        path = self._genes.hops(genome[len(self._numbers.dimensions) :])
        return tuple(Hop(model=self._sources.models[0], layer=layer, scale=scale) for layer, scale in path)

    def decode(self, genome: Genome) -> Recipe:
        """Turn a genome into its recipe, computed in float32 and written in the sources' own type."""
        hops = self.hops(genome)
        slices = [self._slice(genome, hop.layer) for hop in hops]
        recipe = self._numbers.head(self._sources.dtype)
        if any(hop.scale != 1 for hop in hops):
            recipe["evomerge"] |= self._scale(slices, hops)
        return Recipe.from_dict({**recipe, "slices": slices, **if_any(dict(self._settings.constants))})

    def _slice(self, genome: Genome, layer: int) -> dict[str, Any]:
        """The merge of one layer of all models."""
        # Block b has the layers from b L / B, rounded down, on; as in the parameter space.
        block = ((layer + 1) * self._num_blocks - 1) // self._depth
        sources = [self._numbers.source(genome, model, block) for model in self._sources.models]
        base = self._numbers.base
        if base is not None and base not in self._sources.models:
            sources.append({"model": base})
        return {
            "sources": [{**source, "layer_range": [layer, layer + 1]} for source in sources],
            **if_any(self._numbers.parameters(genome, None, block)),
        }

    def _scale(self, slices: Sequence[dict[str, Any]], hops: Sequence[Hop]) -> dict[str, Any]:
        """Multiply the weights of the tensors that carry scales; return what weights cannot express."""
        folded = path_recipe(hops, self.semantics, self._sources.anatomies, dtype=self._sources.dtype)
        anatomy = self._sources.anatomies[hops[0].model]
        for number, (piece, scaled) in enumerate(zip(slices, folded.slices or [], strict=True)):
            scale = (scaled.sources[0].parameters or {}).get("scale")
            if scale is None:
                continue
            names = _names_at(anatomy, hops[number].layer, first=number == 0, last=number == len(hops) - 1)
            for source in piece["sources"]:
                own = source["parameters"]
                source["parameters"] = {**own, "weight": _scaled(own["weight"], scale, names)}
        scales = folded.evomerge.model_dump()["scales"]
        return {"scales": scales} if scales else {}


def _names_at(anatomy: Anatomy, layer: int, *, first: bool, last: bool) -> list[str]:
    """The tensors that the settings of a hop's slice reach."""
    outside = anatomy.layout.get(None, {}).values()
    return [role.name for role in anatomy.layout[layer].values()] + [
        role.name for role in outside if (first if before_layers(role) else last)
    ]


def _scaled(
    weight: Sequence[Mapping[str, Any]], scale: Setting, names: Sequence[str]
) -> list[dict[str, Any]]:
    """A weight's conditional values, multiplied by the scale of each tensor.

    Args:
        weight: The conditional values; the last is for every tensor.
        scale: The scales; tensors that no filter matches keep their weight.
        names: All tensors that the settings reach.
    """
    conditionals = [ConditionalValue.model_validate(conditional) for conditional in weight]
    values: dict[str, tuple[float, float]] = {}  # tensor -> its weight and its scale
    for name in names:
        factor = evaluate(scale, tensor_name=name, depth=1.0, kind="float")
        if factor is not None:
            own = evaluate(conditionals, tensor_name=name, depth=1.0, kind="float")
            assert own is not None
            values[name] = float(own), float(factor)
    # Filters may join tensors that share weight and scale. Marks from 2 on stand for these, as 1 is the mark
    # of a tensor that has none of them and only keeps out of a filter.
    marks = {value: mark for mark, value in enumerate(sorted(set(values.values())), start=2)}
    products = {mark: own * factor for (own, factor), mark in marks.items()}
    found = filters({name: float(marks[value]) for name, value in values.items()}, names)
    scaled = [
        {
            "filter": entry["filter"],
            "value": products[int(entry["value"])]
            if entry["value"] > 1
            else evaluate(conditionals, tensor_name=entry["filter"], depth=1.0, kind="float"),
        }
        for entry in found
    ]
    return [*scaled, *(dict(conditional) for conditional in weight)]


def _depth_faults(settings: JointSettings, sources: SourceModels) -> Iterator[Finding]:
    method = METHODS.get(settings.merge_method)
    models = [*sources.models, *([] if method is None else [base_of(method, sources)])]
    depths = {model: sources.depths[model] for model in models if model is not None}
    if len(set(depths.values())) > 1:
        found = ", ".join(f"{model} {depth}" for model, depth in depths.items())
        yield (
            ("type",),
            f"every hop merges one layer of all models, which differ in their number of layers: {found}",
        )
    depth = sources.depths[sources.models[0]]
    if depth < 2:
        yield ("type",), "a path starts and ends with different layers; the models have one"
    if settings.depth is not None and settings.depth.blocks > depth:
        reason = f"expected at most the models' {depth} layers, got {settings.depth.blocks}"
        yield ("depth", "blocks"), reason


def _scale_faults(settings: JointSettings, sources: SourceModels) -> Iterator[Finding]:
    if settings.scales == "none":
        return
    if settings.merge_method != "linear":
        yield (
            ("scales",),
            f"scales fold into the weights of a linear merge, which multiply every tensor; {settings.merge_method} "
            "has no such numbers; take 'merge_method: linear', or leave scales out",
        )
    elif settings.constants.get("normalize") is not False:
        reason = "a weighted average is divided by its weights, and scales folded into them with it"
        yield ("scales",), f"{reason}; set 'constants: {{normalize: false}}'"
    unknown = [model for model in sources.models[:1] if model not in sources.anatomies]
    if unknown:
        yield ("scales",), f"needs to know what the layers are made of, which is unknown of {unknown[0]}"
