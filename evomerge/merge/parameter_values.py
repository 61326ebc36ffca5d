"""The values of a method's parameters for one tensor, by mergekit's order of precedence.

The model's own entry, its slice, its module, the recipe; a setting whose filters do not match the tensor is
passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigurationError
from evomerge.merge.methods import Method, Parameter, Scope
from evomerge.recipe import InputSlice, OutputSlice, Parameters, Recipe, evaluate

Values = Mapping[str, bool | int | float | None]
TensorValues = tuple[Values, tuple[Values, ...]]
"""Values of the parameters that all inputs share, and of every input's own."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is said about the parameters of one input of a slice, or of all of them together.

    Attributes:
        parameters: Those that it has.
        levels: What sets them, nearest first.
        source: The input, or None.
        fixed: Their values, if all tensors have the same ones.
    """

    parameters: Sequence[Parameter]
    levels: Sequence[Parameters]
    source: InputSlice | None
    fixed: Values | None


class ParameterValues:
    """Looks up parameters for the tensors of one module.

    Args:
        recipe: The recipe.
        method: The method that merges them.
        outer: What is set for all of them, nearest first: by the module and by the recipe.
    """

    def __init__(self, recipe: Recipe, method: Method, outer: Sequence[Parameters]) -> None:
        self._recipe = recipe
        self._method = method
        self._outer = outer
        # Planning asks for every tensor, and most settings are the same for all tensors of a slice.
        self._known: dict[tuple[int, int | None], tuple[list[_Settings], TensorValues | None]] = {}

    def of(
        self,
        piece: OutputSlice,
        name: str,
        inputs: Sequence[tuple[str, str]],
        *,
        base: int | None,
        depth: float,
    ) -> TensorValues:
        """Values for one tensor: of the parameters that all inputs share, and of every input's own.

        Args:
            piece: The slice of the merged model.
            name: Name of the tensor there, that filters of shared parameters are compared with.
            inputs: (model, tensor name) per source of the slice; filters of its own parameters are compared with it.
            base: Position of the base model, or None.
            depth: Position of the tensor's layer in the slice, from 0 to 1.

        Raises:
            ConfigurationError: A required parameter has no value for the tensor, or one that does not suit it.
        """
        key = (id(piece), base)
        if key not in self._known:
            self._known[key] = self._of_slice(piece, len(inputs), base)
        settings, fixed = self._known[key]
        if fixed is not None:
            return fixed
        names = [name, *(tensor for _, tensor in inputs)]
        shared, *values = [self._of(*item, depth) for item in zip(settings, names, strict=True)]
        return shared, tuple(values)

    def _of_slice(
        self, piece: OutputSlice, num_inputs: int, base: int | None
    ) -> tuple[list[_Settings], TensorValues | None]:
        """Settings of the shared parameters, then of every input's; and their values if all tensors have the same."""
        settings = [self._settings(piece, index, base) for index in (None, *range(num_inputs))]
        fixed = [item.fixed for item in settings if item.fixed is not None]
        same = len(fixed) == len(settings)
        return settings, (fixed[0], tuple(fixed[1:])) if same else None

    def _of(self, settings: _Settings, tensor_name: str, depth: float) -> Values:
        if settings.fixed is not None:
            return settings.fixed
        return {
            parameter.name: self._value(parameter, settings.levels, settings.source, tensor_name, depth)
            for parameter in settings.parameters
        }

    def _settings(self, piece: OutputSlice, index: int | None, base: int | None) -> _Settings:
        source = None if index is None else piece.sources[index]
        scopes = (
            {Scope.RECIPE} if index is None else {Scope.MODEL, *([Scope.NON_BASE] if index != base else [])}
        )
        parameters = [parameter for parameter in self._method.parameters if parameter.scope in scopes]
        own = [level.parameters for level in (source, piece) if level is not None and level.parameters]
        levels = [*own, *self._outer]
        fixed = None
        if all(_is_fixed(parameter, levels) for parameter in parameters):
            fixed = {item.name: self._value(item, levels, source, "", 0.0) for item in parameters}
        return _Settings(parameters=parameters, levels=levels, source=source, fixed=fixed)

    def _value(
        self,
        parameter: Parameter,
        levels: Sequence[Parameters],
        source: InputSlice | None,
        tensor_name: str,
        depth: float,
    ) -> bool | int | float | None:
        for level in levels:
            if parameter.name not in level:
                continue
            setting = level[parameter.name]
            try:
                value = evaluate(setting, tensor_name=tensor_name, depth=depth, kind=parameter.kind)
            except ValueError as error:  # a gradient of counts, between two of them
                reason = f"{error} for the tensor {tensor_name}"
                raise ConfigurationError(self._recipe.fault(("parameters", parameter.name), reason)) from None
            if value is not None:
                return parameter.check(value)
        if parameter.required:
            of = f" of {source.model}" if source is not None else ""
            reason = f"{self._method.name} requires it, but no setting{of} matches the tensor {tensor_name}"
            raise ConfigurationError(self._recipe.fault(("parameters", parameter.name), reason))
        return parameter.default


def _is_fixed(parameter: Parameter, levels: Sequence[Parameters]) -> bool:
    """Whether a parameter has one value for all tensors of a slice: a number without filter, or none at all."""
    setting = next((level[parameter.name] for level in levels if parameter.name in level), None)
    if setting is None:
        return not parameter.required
    return bool(setting) and setting[0].filter in (None, "*") and not isinstance(setting[0].value, list)
