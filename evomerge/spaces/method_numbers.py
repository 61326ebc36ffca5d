"""The searched numbers of a merge method: per source model, tensor group and position in depth.

Shared by the spaces that merge weights. What a position in depth means is left to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import nearest
from evomerge.merge.methods import METHODS, BasePolicy, Method, Parameter, Scope
from evomerge.recipe import coerce
from evomerge.records import Dimension
from evomerge.spaces.base import Finding, SourceModels, short_names
from evomerge.spaces.method_settings import Group, MethodSettings, Range
from evomerge.yaml_file import FieldPath


@dataclass(frozen=True)
class _Number:
    """Place of one searched number: a parameter of a model (None: of the recipe) in a group at a depth."""

    parameter: str
    model: str | None
    group: str
    position: int


class MethodNumbers:
    """The searched numbers of a method over given models.

    Attributes:
        method: The method.
        base: The base model that recipes name: the experiment's, unless the method has no use for one.
        dimensions: The searched numbers, in the order in which `parameters` reads them.
    """

    def __init__(self, settings: MethodSettings, sources: SourceModels, *, positions: int = 1) -> None:
        """Lay out the numbers of settings in which `method_faults` found no fault.

        Args:
            settings: What is searched.
            sources: The models.
            positions: Number of positions in depth that have numbers of their own.
        """
        self._settings = settings
        self._models = sources.models
        self._num_positions = positions
        self.method = METHODS[settings.merge_method]
        self.base = base_of(self.method, sources)
        self._numbers = {number: index for index, number in enumerate(self._places())}
        labels = short_names(sources.models)
        self.dimensions: Sequence[Dimension] = tuple(
            self._range(number).dimension(self._name(number, labels)) for number in self._numbers
        )

    def source(self, genome: Sequence[float], model: str, position: int | None = None) -> dict[str, Any]:
        """A source model in a recipe's shape, with its numbers; see `parameters`."""
        return {"model": model, **if_any(self.parameters(genome, model, position))}

    def parameters(
        self, genome: Sequence[float], model: str | None, position: int | None = None
    ) -> dict[str, Any]:
        """The searched parameters of a model, or of the recipe, in a recipe's shape.

        Args:
            genome: One number per dimension.
            model: The model, or None for parameters of scope `recipe`.
            position: Position in depth, or None for a gradient over all of them.
        """
        result: dict[str, Any] = {}
        for parameter in self._searched():
            if model not in self._owners(parameter):
                continue
            result[parameter.name] = conditionals = []
            for group in self._settings.groups:
                positions = self._positions(group)
                if position is not None and len(positions) > 1:
                    positions = [position]
                values = [
                    float(genome[self._numbers[_Number(parameter.name, model, group.name, here)]])
                    for here in positions
                ]
                value = values if len(values) > 1 else values[0]
                conditionals += [{"value": value, "filter": text} for text in group.filters]
                if not group.filters:
                    conditionals.append({"value": value})
        return result

    def head(self, dtype: str) -> dict[str, Any]:
        """The entries of a recipe beside its models and parameters: computed in float32, written in `dtype`."""
        return {
            "merge_method": self.method.name,
            **({"base_model": self.base} if self.base is not None else {}),
            "dtype": "float32",
            "out_dtype": dtype,
            "evomerge": {"seed": self._settings.seed},
        }

    def _places(self) -> Iterator[_Number]:
        for parameter in self._searched():
            for model in self._owners(parameter):
                for group in self._settings.groups:
                    for position in self._positions(group):
                        yield _Number(parameter.name, model, group.name, position)

    def _searched(self) -> list[Parameter]:
        """The searched parameters, in the method's order."""
        return [item for item in self.method.parameters if item.name in self._settings.parameters]

    def _owners(self, parameter: Parameter) -> list[str | None]:
        """The models that have a value of their own; None stands for the recipe."""
        if parameter.scope is Scope.RECIPE:
            return [None]
        return [model for model in self._models if parameter.scope is Scope.MODEL or model != self.base]

    def _positions(self, group: Group) -> list[int]:
        return list(range(self._num_positions)) if group.depth else [0]

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


def if_any(parameters: dict[str, Any]) -> dict[str, Any]:
    """An entry `parameters` of a recipe, unless there are none."""
    return {"parameters": parameters} if parameters else {}


def method_faults(settings: MethodSettings, sources: SourceModels) -> Iterator[Finding]:
    """Hold settings against the method and the models."""
    name = settings.merge_method
    method = METHODS.get(name)
    if method is None:
        reason = f"unknown method {name!r}{nearest(name, METHODS)}"
        yield ("merge_method",), f"{reason}; known methods: {', '.join(sorted(METHODS))}"
        return
    yield from _range_faults(settings, method)
    yield from _constant_faults(settings, method)
    yield from _model_faults(settings, method, sources)


def _range_faults(settings: MethodSettings, method: Method) -> Iterator[Finding]:
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


def _constant_faults(settings: MethodSettings, method: Method) -> Iterator[Finding]:
    known = [parameter.name for parameter in method.parameters]
    for name, value in settings.constants.items():
        place = ("constants", name)
        parameter = method.parameter(name)
        if parameter is None:
            reason = f"{method.name} has no such parameter{nearest(name, known)}"
            yield place, f"{reason}; it has {', '.join(known)}"
            continue
        if name in settings.parameters:
            yield place, "both searched and constant; keep one"
        try:
            parameter.check(coerce(value, parameter.kind))
        except ValueError as error:
            yield place, str(error)


def _model_faults(settings: MethodSettings, method: Method, sources: SourceModels) -> Iterator[Finding]:
    for model in settings.sources:
        if model not in sources.models:
            reason = f"not one of the experiment's models{nearest(model, sources.models)}"
            yield ("sources", model), f"{reason}; these are {', '.join(sources.models)}"
    if method.base is BasePolicy.REQUIRED and sources.base is None:
        yield ("merge_method",), f"{method.name} needs the experiment to name a base_model"
    base = base_of(method, sources)
    others = sum(model != base for model in sources.models)
    if others < method.min_others or others > (method.max_others or others):
        fewest, most = method.min_others, method.max_others
        count = f"{fewest}" if most == fewest else f"{fewest} to {most or 'any number of'}"
        noun = "model" if most == 1 else "models"
        besides = "" if base is None else " besides the base"
        reason = f"{method.name} takes {count} {noun}{besides}; the experiment has {others}"
        yield ("merge_method",), reason


def base_of(method: Method, sources: SourceModels) -> str | None:
    """The base model that recipes name: the experiment's, unless the method has no use for one."""
    return None if method.base is BasePolicy.IGNORED else sources.base
