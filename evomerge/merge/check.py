"""Checks a recipe against the methods' declarations, without reading any model.

Faults are collected, all at once. What another method knows is only a warning, because published recipes
often keep parameters of the method they were first written for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.merge.methods import METHODS, BasePolicy, Method, Parameter, Scope
from evomerge.recipe import Parameters, Recipe, Setting, coerce
from evomerge.yaml_file import FieldPath

DTYPES = ("float32", "bfloat16", "float16")
"""Types a merged model can be written in."""


def check_recipe(recipe: Recipe) -> list[Fault]:
    """Check methods, parameters, values and the number of models.

    Returns:
        Warnings, each with its place in the recipe.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    faults = list(_head_faults(recipe))
    method = METHODS.get(recipe.merge_method)
    if method is None:
        reason = f"unknown method {recipe.merge_method!r}{nearest(recipe.merge_method, METHODS)}"
        known = ", ".join(sorted(METHODS))
        faults.append(recipe.fault(("merge_method",), f"{reason}; known methods: {known}"))
        raise ConfigurationError(faults)
    warnings: list[Fault] = []
    for place, parameters in recipe.parameter_sets():
        for name, setting in parameters.items():
            parameter = method.parameter(name)
            if parameter is not None:
                faults += _value_faults(recipe, (*place, name), parameter, setting)
            elif owners := [other.name for other in METHODS.values() if other.parameter(name)]:
                reason = f"{method.name} has no such parameter and ignores it; it belongs to "
                warnings.append(recipe.fault((*place, name), reason + ", ".join(owners)))
            else:
                known = ", ".join(parameter.name for parameter in method.parameters)
                every = {parameter.name for other in METHODS.values() for parameter in other.parameters}
                reason = f"unknown parameter{nearest(name, every)}; parameters of {method.name}: {known}"
                faults.append(recipe.fault((*place, name), reason))
    for merge in _merges(recipe):
        for fault in (*_input_faults(recipe, method, merge), *_missing_parameters(recipe, method, merge)):
            if fault not in faults:
                faults.append(fault)
        warnings += _without_effect(recipe, method, merge)
    if faults:
        raise ConfigurationError(faults)
    return warnings


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """Models that are merged with each other: those of the recipe or module, or those of one slice.

    Attributes:
        place: Where the inputs stand.
        models: Their names.
        parameters: Their own parameters.
        shared: Parameters that reach all of them: of the slice, the module and the recipe.
        base: The base model that counts here.
        implied: The base model, when the recipe does not list it and it joins the inputs by itself.
    """

    place: FieldPath
    models: list[str]
    parameters: list[Parameters]
    shared: Parameters
    base: str | None
    implied: str | None = None


def _merges(recipe: Recipe) -> Iterator[_Merge]:
    for place, holder in recipe.modules_or_self():
        shared = {**(recipe.parameters or {}), **(holder.parameters or {})}
        if holder.models is not None:
            names = [model.model for model in holder.models]
            yield _Merge(
                place=(*place, "models"),
                models=names,
                parameters=[model.parameters or {} for model in holder.models],
                shared=shared,
                base=recipe.base_model,
                implied=recipe.base_model if recipe.base_model not in names else None,
            )
        for number, piece in enumerate(holder.slices or []):
            yield _Merge(
                place=(*place, "slices", number, "sources"),
                models=[source.model for source in piece.sources],
                parameters=[source.parameters or {} for source in piece.sources],
                shared={**shared, **(piece.parameters or {})},
                base=piece.base_model or recipe.base_model,
            )


def _head_faults(recipe: Recipe) -> Iterator[Fault]:
    for key in ("dtype", "out_dtype"):
        value = getattr(recipe, key)
        if value is not None and value not in DTYPES:
            reason = f"expected one of {', '.join(DTYPES)}, got {value!r}{nearest(value, DTYPES)}"
            yield recipe.fault((key,), reason)


def _value_faults(
    recipe: Recipe, place: FieldPath, parameter: Parameter, setting: Setting
) -> Iterator[Fault]:
    for conditional in setting:
        values = conditional.value if isinstance(conditional.value, list) else [conditional.value]
        for value in values:
            try:
                parameter.check(coerce(value, parameter.kind))
            except ValueError as error:
                yield recipe.fault(place, str(error))


def _input_faults(recipe: Recipe, method: Method, merge: _Merge) -> Iterator[Fault]:
    for name in sorted({name for name in merge.models if merge.models.count(name) > 1}):
        yield recipe.fault(merge.place, f"the model {name!r} appears twice in one merge")
    names = [*merge.models, *([merge.implied] if merge.implied else [])]
    if method.base is BasePolicy.REQUIRED and merge.base is None:
        reason = f"missing; {method.name} needs a base model, the one its sources were fine-tuned from"
        yield recipe.fault(("base_model",), reason)
        return
    base = None if method.base is BasePolicy.IGNORED else merge.base
    if base is not None and base not in names:
        reason = f"{method.name} needs the base model {base!r} among the sources of every slice"
        yield recipe.fault(merge.place, reason)
        return
    others = [name for name in names if name != base]
    expected = _expected_number(method, len(others))
    if expected:
        besides = f" besides the base {base!r}" if base is not None else ""
        found = ", ".join(others) or "none"
        yield recipe.fault(merge.place, f"{method.name} takes {expected}{besides}; got {found}")


def _expected_number(method: Method, count: int) -> str:
    """How many models a method takes, in words, when `count` is not one of these; else empty."""
    fewest, most = method.min_others, method.max_others
    if count >= fewest and (most is None or count <= most):
        return ""
    limit = "exactly" if fewest == most else "at least" if count < fewest else "at most"
    number = fewest if count < fewest else most
    return f"{limit} {number} model{'' if number == 1 else 's'}"


def _missing_parameters(recipe: Recipe, method: Method, merge: _Merge) -> Iterator[Fault]:
    """Required parameters that nothing gives; filters are judged per tensor when planned."""
    for parameter in method.parameters:
        if not parameter.required or parameter.name in merge.shared:
            continue
        reason = f"missing; {method.name} requires it"
        if parameter.scope is Scope.RECIPE:
            yield recipe.fault(("parameters", parameter.name), reason)
            continue
        for index, (model, own) in enumerate(zip(merge.models, merge.parameters, strict=True)):
            needs_it = parameter.scope is Scope.MODEL or model != merge.base
            if needs_it and parameter.name not in own:
                yield recipe.fault((*merge.place, index, "parameters", parameter.name), reason)
        if merge.implied and parameter.scope is Scope.MODEL:
            reason = f"{method.name} merges the base model too and requires its {parameter.name!r}; "
            yield recipe.fault(("base_model",), reason + "list it under 'models', or remove base_model")


def _without_effect(recipe: Recipe, method: Method, merge: _Merge) -> Iterator[Fault]:
    """Parameters of single models that the method does not read there."""
    for index, (model, own) in enumerate(zip(merge.models, merge.parameters, strict=True)):
        for name in own:
            place = (*merge.place, index, "parameters", name)
            parameter = method.parameter(name)
            if parameter is None:
                continue
            if parameter.scope is Scope.RECIPE:
                reason = "has no effect on a single model; move it to the recipe's or slice's parameters"
                yield recipe.fault(place, reason)
            elif parameter.scope is Scope.NON_BASE and model == merge.base:
                yield recipe.fault(place, "has no effect on the base model, which has no task vector")
