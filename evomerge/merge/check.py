"""Checks a recipe against the methods' declarations, without reading any model.

Faults are collected, all at once. What another method knows is only a warning, because published recipes
often keep parameters of the method they were first written for.
"""

from __future__ import annotations

from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.merge.methods import METHODS, BasePolicy, Method, Scope
from evomerge.recipe import InputModel, InputSlice, Parameters, Recipe, coerce
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
    faults: list[Fault] = []
    for key in ("dtype", "out_dtype"):
        value = getattr(recipe, key)
        if value is not None and value not in DTYPES:
            expected = ", ".join(DTYPES)
            faults.append(
                recipe.fault((key,), f"expected one of {expected}, got {value!r}{nearest(value, DTYPES)}")
            )
    if recipe.modules is not None and len(recipe.modules) > 1:
        found = ", ".join(recipe.modules)
        faults.append(
            recipe.fault(("modules",), f"models of several modules are not supported yet; got {found}")
        )
    method = METHODS.get(recipe.merge_method)
    if method is None:
        reason = f"unknown method {recipe.merge_method!r}{nearest(recipe.merge_method, METHODS)}"
        faults.append(
            recipe.fault(("merge_method",), f"{reason}; known methods: {', '.join(sorted(METHODS))}")
        )
        raise ConfigurationError(faults)
    faults += _check_inputs(recipe, method)
    warnings: list[Fault] = []
    for place, parameters in recipe.parameter_sets():
        is_model_level = place[:-1] in {input_place for input_place, _ in recipe.inputs()}
        _check_parameters(recipe, method, place, parameters, is_model_level, faults, warnings)
    faults += _missing_parameters(recipe, method)
    if faults:
        raise ConfigurationError(faults)
    return warnings


def _check_parameters(
    recipe: Recipe,
    method: Method,
    place: FieldPath,
    parameters: Parameters,
    is_model_level: bool,
    faults: list[Fault],
    warnings: list[Fault],
) -> None:
    for name, setting in parameters.items():
        here = (*place, name)
        parameter = method.parameter(name)
        if parameter is None:
            owners = [other.name for other in METHODS.values() if other.parameter(name)]
            if owners:
                reason = f"{method.name} has no such parameter and ignores it; it belongs to "
                warnings.append(recipe.fault(here, reason + ", ".join(owners)))
            else:
                known = [known.name for known in method.parameters]
                reason = f"unknown parameter{nearest(name, known)}"
                faults.append(
                    recipe.fault(here, f"{reason}; parameters of {method.name}: {', '.join(known)}")
                )
            continue
        if is_model_level and parameter.scope is Scope.RECIPE:
            reason = "has no effect on a single model; move it to the recipe's or slice's parameters"
            warnings.append(recipe.fault(here, reason))
        for conditional in setting:
            values = conditional.value if isinstance(conditional.value, list) else [conditional.value]
            for value in values:
                if value is None:
                    continue
                try:
                    parameter.check(coerce(value, parameter.kind))
                except ValueError as error:
                    faults.append(recipe.fault(here, str(error)))


def _check_inputs(recipe: Recipe, method: Method) -> list[Fault]:
    faults: list[Fault] = []
    groups: dict[FieldPath, list[InputModel | InputSlice]] = {}
    for place, source in recipe.inputs():
        groups.setdefault(place[:-1], []).append(source)
    for place, sources in groups.items():
        names = [source.model for source in sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            faults.append(recipe.fault(place, f"the model {name!r} appears twice in one merge"))
        base = recipe.base_model
        if isinstance(sources[0], InputSlice):
            number = place[-2]
            for _, module in recipe.modules_or_self():
                assert module.slices is not None
                base = module.slices[int(number)].base_model or base
            if method.base is BasePolicy.REQUIRED and base is not None and base not in names:
                reason = f"{method.name} needs the base model {base!r} among the sources of every slice"
                faults.append(recipe.fault(place, reason))
        elif base is not None and base not in names:
            names.append(base)
        if method.base is BasePolicy.REQUIRED and base is None:
            reason = f"missing; {method.name} needs a base model, the one its sources were fine-tuned from"
            fault = recipe.fault(("base_model",), reason)
            if fault not in faults:
                faults.append(fault)
        if len(names) < method.min_models:
            reason = f"{method.name} needs at least {method.min_models} models, the base counted; "
            faults.append(recipe.fault(place, reason + f"got {', '.join(names)}"))
        if method.max_models is not None and len(names) > method.max_models:
            reason = f"{method.name} takes at most {method.max_models} models, the base counted; "
            faults.append(recipe.fault(place, reason + f"got {', '.join(names)}"))
    return faults


def _missing_parameters(recipe: Recipe, method: Method) -> list[Fault]:
    """Required parameters that a model can get from nowhere; filters are judged per tensor when planned."""
    everywhere = [
        parameters
        for place, parameters in recipe.parameter_sets()
        if place[:-1] not in {input_place for input_place, _ in recipe.inputs()}
    ]
    faults = []
    for parameter in method.parameters:
        if not parameter.required or any(parameter.name in parameters for parameters in everywhere):
            continue
        reason = f"missing; {method.name} requires it"
        if parameter.scope is Scope.RECIPE:
            faults.append(recipe.fault(("parameters", parameter.name), reason))
            continue
        for place, source in recipe.inputs():
            is_base = source.model == recipe.base_model
            if is_base and parameter.scope is Scope.NON_BASE:
                continue
            if parameter.name not in (source.parameters or {}):
                faults.append(recipe.fault((*place, "parameters", parameter.name), reason))
    return faults
