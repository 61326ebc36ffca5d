"""The parameter space: the numbers of a merge method, per source model, tensor group and depth.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.1, searches weight and density per source model. Here a number can further be split by tensor
groups (name filters) and over depth, either in blocks of consecutive layers or as a gradient between
control points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ConfigurationError, nearest
from evomerge.merge.methods import METHODS, BasePolicy, Method, Parameter, Scope
from evomerge.recipe import Recipe, coerce
from evomerge.records import Dimension, Genome
from evomerge.spaces.base import SourceModels, short_names
from evomerge.spaces.parameter_settings import Group, ParameterSpaceSettings, Range
from evomerge.yaml_file import Document, FieldPath


@dataclass(frozen=True)
class _Number:
    """Place of one searched number: a parameter of a model (None: of the recipe) in a group at a depth."""

    parameter: str
    model: str | None
    group: str
    position: int


class ParameterSpace:
    """A parameter space over given source models; see the module's description."""

    def __init__(
        self, settings: ParameterSpaceSettings, sources: SourceModels, document: Document | None = None
    ) -> None:
        """Check the settings against the method and the models.

        Raises:
            ConfigurationError: Carries every fault found.
        """
        self._settings = settings
        self._sources = sources
        self._document = document or Document(data=None)
        self._method = self._check()
        self._numbers = {number: index for index, number in enumerate(self._places())}
        labels = short_names(sources.models)
        self._dimensions = tuple(
            self._range(number).dimension(self._name(number, labels)) for number in self._numbers
        )

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """The searched numbers, in the genome's order."""
        return self._dimensions

    def decode(self, genome: Genome) -> Recipe:
        """Turn a genome into its recipe, computed in float32 and written in the sources' own type."""
        if len(genome) != len(self._dimensions):
            raise ValueError(f"expected {len(self._dimensions)} numbers, got {len(genome)}")
        recipe: dict[str, Any] = {"merge_method": self._method.name}
        blocks = self._settings.depth.blocks if self._settings.depth else None
        shared: dict[str, Any] = {}
        if blocks is None:
            recipe["models"] = [self._source(genome, model) for model in self._sources.models]
            shared = self._parameters(genome, None)
        else:
            recipe["slices"] = [self._slice(genome, block, blocks) for block in range(blocks)]
        base = _base(self._method, self._sources)
        if base is not None:
            recipe["base_model"] = base
        recipe |= _if_any({**self._settings.constants, **shared})
        recipe["dtype"] = "float32"
        recipe["out_dtype"] = self._sources.dtype
        recipe["evomerge"] = {"seed": self._settings.seed}
        return Recipe.from_dict(recipe)

    def _slice(self, genome: Genome, block: int, blocks: int) -> dict[str, Any]:
        layers = self._sources.num_layers
        span = [block * layers // blocks, (block + 1) * layers // blocks]
        sources = [self._source(genome, model, block) for model in self._sources.models]
        base = _base(self._method, self._sources)
        if base is not None and base not in self._sources.models:
            sources.append({"model": base})
        return {
            "sources": [{**source, "layer_range": span} for source in sources],
            **_if_any(self._parameters(genome, None, block)),
        }

    def _source(self, genome: Genome, model: str, block: int | None = None) -> dict[str, Any]:
        return {"model": model, **_if_any(self._parameters(genome, model, block))}

    def _parameters(self, genome: Genome, model: str | None, block: int | None = None) -> dict[str, Any]:
        """The searched parameters of a model, or of the recipe, in a recipe's shape.

        Args:
            genome: The searched numbers.
            model: The model, or None for parameters of scope `recipe`.
            block: Block of layers, or None for the whole depth.
        """
        result: dict[str, Any] = {}
        for parameter in self._searched():
            if model not in self._owners(parameter):
                continue
            result[parameter.name] = conditionals = []
            for group in self._settings.groups:
                positions = self._positions(group)
                if block is not None and len(positions) > 1:
                    positions = [block]
                values = [
                    float(genome[self._numbers[_Number(parameter.name, model, group.name, position)]])
                    for position in positions
                ]
                value = values if len(values) > 1 else values[0]
                conditionals += [{"value": value, "filter": text} for text in group.filters]
                if not group.filters:
                    conditionals.append({"value": value})
        return result

    def _places(self) -> Iterator[_Number]:
        for parameter in self._searched():
            for model in self._owners(parameter):
                for group in self._settings.groups:
                    for position in self._positions(group):
                        yield _Number(parameter.name, model, group.name, position)

    def _searched(self) -> list[Parameter]:
        """The searched parameters, in the method's order."""
        return [item for item in self._method.parameters if item.name in self._settings.parameters]

    def _owners(self, parameter: Parameter) -> list[str | None]:
        """The models that have a value of their own; None stands for the recipe."""
        if parameter.scope is Scope.RECIPE:
            return [None]
        return [
            model
            for model in self._sources.models
            if parameter.scope is Scope.MODEL or model != _base(self._method, self._sources)
        ]

    def _positions(self, group: Group) -> list[int]:
        depth = self._settings.depth
        if depth is None or not group.depth:
            return [0]
        return list(range(depth.blocks or depth.smooth or 1))

    def _range(self, number: _Number) -> Range:
        own = self._settings.sources.get(number.model or "", {})
        return own.get(number.parameter, self._settings.parameters[number.parameter])

    def _name(self, number: _Number, labels: Mapping[str, str]) -> str:
        name = number.parameter
        if number.model is not None:
            name += f"[{labels[number.model]}]"
        if len(self._settings.groups) > 1:
            name += f".{number.group}"
        group = next(group for group in self._settings.groups if group.name == number.group)
        return f"{name}.{number.position}" if len(self._positions(group)) > 1 else name

    def _check(self) -> Method:
        """Hold the settings against the method and the models; report every fault at once."""
        name = self._settings.merge_method
        method = METHODS.get(name)
        if method is None:
            reason = f"unknown method {name!r}{nearest(name, METHODS)}"
            known = ", ".join(sorted(METHODS))
            raise ConfigurationError(
                self._document.fault(("merge_method",), f"{reason}; known methods: {known}")
            )
        found = (*self._range_faults(method), *self._constant_faults(method), *self._model_faults(method))
        if found:
            raise ConfigurationError([self._document.fault(place, reason) for place, reason in found])
        return method

    def _range_faults(self, method: Method) -> Iterator[tuple[FieldPath, str]]:
        settings = self._settings
        ranges: list[tuple[FieldPath, Range]] = [
            (("parameters", name), span) for name, span in settings.parameters.items()
        ]
        for model, own in settings.sources.items():
            ranges += [(("sources", model, name), span) for name, span in own.items()]
        known = [parameter.name for parameter in method.parameters if parameter.kind != "bool"]
        for place, span in ranges:
            name = str(place[-1])
            parameter = method.parameter(name)
            if parameter is None or parameter.kind == "bool":
                reason = f"{method.name} has no number of this name{nearest(name, known)}"
                yield place, f"{reason}; it has {', '.join(known)}"
                continue
            if place[0] == "sources" and parameter.scope is Scope.RECIPE:
                yield place, f"{name} is one number for the whole recipe; set its range under 'parameters'"
            elif place[0] == "sources" and name not in settings.parameters:
                yield place, "not searched; add it to 'parameters' as well"
            for key in ("low", "high"):
                try:
                    parameter.check(getattr(span, key))
                except ValueError as error:
                    yield (*place, key), str(error)
        for parameter in method.parameters:
            if parameter.required and parameter.name not in {**settings.parameters, **settings.constants}:
                reason = f"{method.name} requires {parameter.name!r}; give it a range here or a constant"
                yield ("parameters",), reason

    def _constant_faults(self, method: Method) -> Iterator[tuple[FieldPath, str]]:
        known = [parameter.name for parameter in method.parameters]
        for name, value in self._settings.constants.items():
            place = ("constants", name)
            parameter = method.parameter(name)
            if parameter is None:
                reason = f"{method.name} has no such parameter{nearest(name, known)}"
                yield place, f"{reason}; it has {', '.join(known)}"
                continue
            if name in self._settings.parameters:
                yield place, "both searched and constant; keep one"
            try:
                parameter.check(coerce(value, parameter.kind))
            except ValueError as error:
                yield place, str(error)

    def _model_faults(self, method: Method) -> Iterator[tuple[FieldPath, str]]:
        settings, sources = self._settings, self._sources
        for model in settings.sources:
            if model not in sources.models:
                reason = f"not one of the experiment's models{nearest(model, sources.models)}"
                yield ("sources", model), f"{reason}; these are {', '.join(sources.models)}"
        if method.base is BasePolicy.REQUIRED and sources.base is None:
            yield ("merge_method",), f"{method.name} needs the experiment to name a base_model"
        base = _base(method, sources)
        others = sum(model != base for model in sources.models)
        if others < method.min_others or others > (method.max_others or others):
            fewest, most = method.min_others, method.max_others
            count = f"{fewest}" if most == fewest else f"{fewest} to {most or 'any number of'}"
            noun = "model" if most == 1 else "models"
            besides = "" if base is None else " besides the base"
            reason = f"{method.name} takes {count} {noun}{besides}; the experiment has {others}"
            yield ("merge_method",), reason
        blocks = settings.depth.blocks if settings.depth else None
        if blocks is not None and blocks > sources.num_layers:
            reason = f"expected at most the models' {sources.num_layers} layers, got {blocks}"
            yield ("depth", "blocks"), reason


def _if_any(parameters: dict[str, Any]) -> dict[str, Any]:
    """An entry `parameters` of a recipe, unless there are none."""
    return {"parameters": parameters} if parameters else {}


def _base(method: Method, sources: SourceModels) -> str | None:
    """The base model that recipes name: the experiment's, unless the method has no use for one."""
    return None if method.base is BasePolicy.IGNORED else sources.base
