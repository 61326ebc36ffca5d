"""The parameter space: the numbers of a merge method, per source model, tensor group and depth.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.1, searches weight and density per source model. Here a number can further be split by tensor
groups (name filters) and over depth, either in blocks of consecutive layers or as a gradient between
control points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.merge.methods import METHODS, BasePolicy, Method, Scope
from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome
from evomerge.spaces.base import SourceModels, short_names
from evomerge.yaml_file import Document, StrictRecord


class Range(StrictRecord):
    """Where a searched number may lie.

    Attributes:
        low: Smallest value; a negative one allows negative weights.
        high: Largest value.
        start: Where the search starts; the middle by default.
        scale: `log` searches ratios instead of differences.
    """

    low: float
    high: float
    start: float | None = None
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"expected low <= high, got low {self.low:g} and high {self.high:g}; swap them")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low > 0, got {self.low:g}")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"expected start between {self.low:g} and {self.high:g}, got {self.start:g}")
        return self

    def dimension(self, name: str) -> Dimension:
        """The searched number of this range."""
        middle = (self.low * self.high) ** 0.5 if self.scale == "log" else (self.low + self.high) / 2
        start = middle if self.start is None else self.start
        return Dimension(name=name, low=self.low, high=self.high, start=start, log=self.scale == "log")


class Group(StrictRecord):
    """Tensors that share their numbers.

    Attributes:
        name: Name for tables and messages.
        filters: A tensor whose name contains one of them belongs to the group, unless an earlier group has
            it; a group without filters takes the rest and comes last.
        depth: Whether the numbers vary over depth as the space says; false for embeddings and heads.
    """

    name: str
    filters: list[str] = []
    depth: bool = True


class Depth(StrictRecord):
    """How numbers vary over depth.

    Attributes:
        blocks: Number of blocks of consecutive layers, each with its own numbers.
        smooth: Number of control points, spread evenly from the first layer to the last; layers between
            them are interpolated linearly.
    """

    blocks: Annotated[int, Field(ge=1)] | None = None
    smooth: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Depth:
        if (self.blocks is None) == (self.smooth is None):
            raise ValueError("expected exactly one of 'blocks' and 'smooth'")
        return self


class ParameterSpaceSettings(StrictRecord):
    """A search space file of type `parameter`.

    Attributes:
        type: `parameter`.
        merge_method: The method whose parameters are searched.
        parameters: Searched parameter -> range.
        sources: Model -> searched parameter -> range, where a model needs another range.
        constants: Fixed parameters of the recipe, such as `normalize`.
        groups: Tensor groups; one group of all tensors by default.
        depth: Variation over depth; none by default.
        seed: Seed of DARE's masks.
    """

    type: Literal["parameter"]
    merge_method: str
    parameters: Annotated[dict[str, Range], Field(min_length=1)]
    sources: dict[str, dict[str, Range]] = {}
    constants: dict[str, bool | float] = {}
    groups: Annotated[list[Group], Field(min_length=1)] = [Group(name="all")]
    depth: Depth | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_groups(self) -> ParameterSpaceSettings:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups: names must differ, got {', '.join(names)}")
        for group in self.groups[:-1]:
            if not group.filters:
                raise ValueError(
                    f"groups: only the last group may go without filters, {group.name!r} has none"
                )
        if self.groups[-1].filters:
            raise ValueError(
                "groups: the last group must have no filters, so that every tensor belongs to a group"
            )
        return self


@dataclass(frozen=True, kw_only=True)
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
        if blocks is None:
            recipe["models"] = [
                {"model": model, "parameters": self._model_parameters(genome, model)}
                for model in self._sources.models
            ]
            shared = self._parameters(genome, Scope.RECIPE, None, None)
        else:
            recipe["slices"] = [self._slice(genome, block, blocks) for block in range(blocks)]
            shared = {}
        if self._method.base is BasePolicy.REQUIRED:
            recipe["base_model"] = self._sources.base
        constants = {**self._settings.constants, **shared}
        if constants:
            recipe["parameters"] = constants
        recipe["dtype"] = "float32"
        recipe["out_dtype"] = self._sources.dtype
        recipe["evomerge"] = {"seed": self._settings.seed}
        return Recipe.from_dict(recipe)

    def _slice(self, genome: Genome, block: int, blocks: int) -> dict[str, Any]:
        layers = self._sources.num_layers
        span = [block * layers // blocks, (block + 1) * layers // blocks]
        sources: list[dict[str, Any]] = [
            {"model": model, "layer_range": span, "parameters": self._model_parameters(genome, model, block)}
            for model in self._sources.models
        ]
        if self._method.base is BasePolicy.REQUIRED and self._sources.base not in self._sources.models:
            sources.append({"model": self._sources.base, "layer_range": span})
        result: dict[str, Any] = {"sources": sources}
        shared = self._parameters(genome, Scope.RECIPE, None, block)
        if shared:
            result["parameters"] = shared
        return result

    def _model_parameters(self, genome: Genome, model: str, block: int | None = None) -> dict[str, Any]:
        return {
            **self._parameters(genome, Scope.MODEL, model, block),
            **self._parameters(genome, Scope.NON_BASE, model, block),
        }

    def _parameters(
        self, genome: Genome, scope: Scope, model: str | None, block: int | None
    ) -> dict[str, Any]:
        """Searched parameters of one scope in a recipe's shape: group filters with values or gradients."""
        result: dict[str, Any] = {}
        for parameter in self._method.parameters:
            if parameter.name not in self._settings.parameters or parameter.scope is not scope:
                continue
            conditionals: list[dict[str, Any]] = []
            for group in self._settings.groups:
                positions = self._positions(group)
                if block is not None:
                    positions = [block if len(positions) > 1 else 0]
                values = [
                    genome[
                        self._numbers[
                            _Number(
                                parameter=parameter.name, model=model, group=group.name, position=position
                            )
                        ]
                    ]
                    for position in positions
                ]
                value = values if len(values) > 1 else values[0]
                conditionals += [{"value": value, "filter": text} for text in group.filters]
                if not group.filters:
                    conditionals.append({"value": value})
            result[parameter.name] = conditionals
        return result

    def _places(self) -> Iterator[_Number]:
        for parameter in self._method.parameters:
            if parameter.name not in self._settings.parameters:
                continue
            models: Sequence[str | None] = [None] if parameter.scope is Scope.RECIPE else self._sources.models
            for model in models:
                for group in self._settings.groups:
                    for position in self._positions(group):
                        yield _Number(
                            parameter=parameter.name, model=model, group=group.name, position=position
                        )

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
        settings, sources, fault = self._settings, self._sources, self._document.fault
        method = METHODS.get(settings.merge_method)
        if method is None:
            reason = f"unknown method {settings.merge_method!r}{nearest(settings.merge_method, METHODS)}"
            raise ConfigurationError(
                fault(("merge_method",), f"{reason}; known methods: {', '.join(sorted(METHODS))}")
            )
        faults: list[Fault] = []
        known = [parameter.name for parameter in method.parameters]
        ranges: list[tuple[tuple[str, ...], str, Range]] = [
            (("parameters", name), name, span) for name, span in settings.parameters.items()
        ]
        for model, own in settings.sources.items():
            if model not in sources.models:
                reason = f"not one of the experiment's models{nearest(model, sources.models)}; "
                faults.append(fault(("sources", model), reason + ", ".join(sources.models)))
            ranges += [(("sources", model, name), name, span) for name, span in own.items()]
        for place, name, span in ranges:
            parameter = method.parameter(name)
            if parameter is None or parameter.kind == "bool":
                reason = f"{method.name} has no number of this name{nearest(name, known)}; its parameters: "
                faults.append(fault(place, reason + ", ".join(known)))
                continue
            if place[0] == "sources" and name not in settings.parameters:
                faults.append(fault(place, "not searched; add it to 'parameters' as well"))
            for key in ("low", "high"):
                try:
                    parameter.check(getattr(span, key))
                except ValueError as error:
                    faults.append(fault((*place, key), str(error)))
        for name, value in settings.constants.items():
            parameter = method.parameter(name)
            place = ("constants", name)
            if parameter is None:
                reason = f"unknown parameter of {method.name}{nearest(name, known)}; its parameters: "
                faults.append(fault(place, reason + ", ".join(known)))
            elif name in settings.parameters:
                faults.append(fault(place, "both searched and constant; keep one"))
            elif (parameter.kind == "bool") != isinstance(value, bool):
                expected = "true or false" if parameter.kind == "bool" else "a number"
                faults.append(fault(place, f"expected {expected}, got {value!r}"))
        for parameter in method.parameters:
            given = parameter.name in settings.parameters or parameter.name in settings.constants
            if parameter.required and not given:
                reason = f"{method.name} requires {parameter.name!r}; give it a range here or a constant"
                faults.append(fault(("parameters",), reason))
        num_models = len(sources.models) + (
            method.base is BasePolicy.REQUIRED and sources.base not in sources.models
        )
        if method.base is BasePolicy.REQUIRED and sources.base is None:
            faults.append(
                fault(("merge_method",), f"{method.name} needs the experiment to name a base_model")
            )
        if num_models < method.min_models or num_models > (method.max_models or num_models):
            expected = f"{method.min_models} to {method.max_models or 'any number of'}"
            reason = (
                f"{method.name} takes {expected} models, the base counted; the experiment has {num_models}"
            )
            faults.append(fault(("merge_method",), reason))
        blocks = settings.depth.blocks if settings.depth else None
        if blocks is not None and blocks > sources.num_layers:
            reason = f"expected at most the models' {sources.num_layers} layers, got {blocks}"
            faults.append(fault(("depth", "blocks"), reason))
        if faults:
            raise ConfigurationError(faults)
        return method
