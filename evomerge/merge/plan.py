"""Recipe + models -> one operation per output tensor.

Planning reads names, shapes and types only, never weights. The order of precedence of parameters is
mergekit's: the model's own entry, its slice, its module, the recipe; a setting whose filters do not match
the tensor is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.architecture import TensorRole, before_layers, layer_name
from evomerge.checkpoints.decoder import text_config
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, ConfigurationError, Fault
from evomerge.merge.layout import Layout, layout_of
from evomerge.merge.methods import METHODS, Method, Parameter, Scope
from evomerge.recipe import InputModel, InputSlice, Module, OutputSlice, Parameters, Recipe, evaluate

MAX_FAULTS = 20
"""Models of different architectures disagree in every tensor; the first faults tell enough."""

TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""safetensors' name of a floating-point type -> torch's; every other type is copied, not merged."""


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How one output tensor is made.

    Attributes:
        name: Name in the merged model.
        shape: Its shape.
        dtype: Torch's name of the type it is rounded to, or None for a tensor that is copied as it is.
        inputs: (model, tensor name) per input, in the recipe's order.
        base: Position of the base model in `inputs`, or None.
        method: The method that merges it.
        shared: Values of the method's parameters of scope `recipe`.
        values: Per input, the values of its parameters.
        seed: The recipe's seed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    inputs: tuple[tuple[str, str], ...]
    base: int | None
    method: Method
    shared: Mapping[str, Any]
    values: tuple[Mapping[str, Any], ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """The operations of a recipe.

    Attributes:
        tensors: One plan per output tensor, sorted by name.
        layers: For every layer of the merged model, the model and layer it stems from in the first place:
            the base's, or the first source's.
        donor: The model that gives config and tokenizer: the base, or the first model.
    """

    tensors: tuple[TensorPlan, ...]
    layers: tuple[tuple[str, int], ...]
    donor: str

    @property
    def num_layers(self) -> int:
        """Number of layers of the merged model."""
        return len(self.layers)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where in the merged model a tensor lies: its slice, its depth there, and whose layers it takes."""

    piece: OutputSlice
    module: Module | None
    depth: float
    layers: tuple[int | None, ...]
    out_layer: int | None


def plan_merge(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> MergePlan:
    """Plan every output tensor of a recipe that `check_recipe` accepted.

    Args:
        recipe: The recipe.
        checkpoints: Model as the recipe names it -> its checkpoint.

    Raises:
        CheckpointError: The models do not fit together; names tensors, models and shapes.
        ConfigurationError: A parameter has no value for some tensor.
    """
    planner = _Planner(recipe, checkpoints)
    tensors = tuple(sorted(planner.tensors(), key=lambda tensor: tensor.name))
    if planner.faults:
        raise CheckpointError(planner.faults[:MAX_FAULTS])
    return MergePlan(tensors=tensors, layers=tuple(planner.layers()), donor=planner.donor)


class _Planner:
    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.recipe = recipe
        self.checkpoints = checkpoints
        self.method = METHODS[recipe.merge_method]
        self.faults: list[Fault] = []
        self.layouts: dict[str, Layout] = {}
        for name in recipe.model_names:
            try:
                self.layouts[name] = layout_of(checkpoints[name])
            except ValueError as error:
                raise CheckpointError(Fault(path=name, reason=str(error))) from None
        # Slice, base and input, or None for what inputs share -> their parameters, if they are fixed.
        self.same: dict[tuple[int, int | None, int | None], Mapping[str, bool | int | float | None]] = {}
        self.module, self.pieces = self.output_slices()
        self.donor = recipe.base_model or self.pieces[0].sources[0].model

    def output_slices(self) -> tuple[Module | None, list[OutputSlice]]:
        """The recipe in the `slices` form: whole models become one slice, the base added to it."""
        ((_, holder),) = self.recipe.modules_or_self()
        module = holder if isinstance(holder, Module) else None
        if holder.slices is not None:
            return module, list(holder.slices)
        models = list(holder.models or [])
        base = self.recipe.base_model
        if base is not None and all(model.model != base for model in models):
            models.append(InputModel(model=base))
        depths = {model.model: self.depth_of(model.model) for model in models}
        if len(set(depths.values())) > 1:
            found = ", ".join(f"{name} {depth}" for name, depth in depths.items())
            raise CheckpointError(
                self.recipe.fault(("models",), f"the models differ in their number of layers: {found}")
            )
        sources = [
            InputSlice(model=model.model, layer_range=(0, depths[model.model]), parameters=model.parameters)
            for model in models
        ]
        return module, [OutputSlice(sources=sources)]

    def depth_of(self, model: str) -> int:
        return sum(layer is not None for layer in self.layouts[model])

    def layers(self) -> Iterator[tuple[str, int]]:
        for piece in self.pieces:
            base = piece.base_model or self.recipe.base_model
            source = next((source for source in piece.sources if source.model == base), piece.sources[0])
            for layer in range(*source.layer_range):
                yield source.model, layer

    def tensors(self) -> Iterator[TensorPlan]:
        yield from self.outside_layers(self.pieces[0], before=True)
        out_layer = 0
        for number, piece in enumerate(self.pieces):
            for source in piece.sources:
                depth = self.depth_of(source.model)
                if source.layer_range[1] > depth:
                    path = ("slices", number, "sources")
                    reason = f"{source.model} has {depth} layers, got layer_range {list(source.layer_range)}"
                    raise CheckpointError(self.recipe.fault(path, reason))
            for offset in range(piece.num_layers):
                place = _Place(
                    piece=piece,
                    module=self.module,
                    depth=offset / (piece.num_layers - 1) if piece.num_layers > 1 else 1.0,
                    layers=tuple(source.layer_range[0] + offset for source in piece.sources),
                    out_layer=out_layer,
                )
                yield from self.at(place, [self.roles_at(place, i) for i in range(len(place.layers))])
                out_layer += 1
        yield from self.outside_layers(self.pieces[-1], before=False)

    def outside_layers(self, piece: OutputSlice, *, before: bool) -> Iterator[TensorPlan]:
        place = _Place(
            piece=piece, module=self.module, depth=0.0, layers=(None,) * len(piece.sources), out_layer=None
        )
        yield from self.at(
            place,
            [
                {
                    name: role
                    for name, role in self.roles_at(place, i).items()
                    if before_layers(role) == before
                }
                for i in range(len(place.layers))
            ],
        )

    def roles_at(self, place: _Place, index: int) -> Mapping[str, TensorRole]:
        return self.layouts[place.piece.sources[index].model].get(place.layers[index], {})

    def at(self, place: _Place, roles: Sequence[Mapping[str, TensorRole]]) -> Iterator[TensorPlan]:
        """Plan the tensors of one place; every source must have the same ones there."""
        sources = place.piece.sources
        for index in range(1, len(sources)):
            for missing in sorted(roles[0].keys() - roles[index].keys()):
                self.missing(missing, lacks=sources[index].model, has=sources[0].model)
            for missing in sorted(roles[index].keys() - roles[0].keys()):
                self.missing(missing, lacks=sources[0].model, has=sources[index].model)
        for template in roles[0]:
            if all(template in others for others in roles[1:]):
                plan = self.tensor(place, template)
                if plan is not None:
                    yield plan

    def missing(self, template: str, *, lacks: str, has: str) -> None:
        reason = f"missing, but {has} has it; sources must share one architecture"
        if text_config(self.checkpoints[lacks].config).get("tie_word_embeddings") and "{}" not in template:
            reason += " (this model ties its output head to its embedding)"
        fault = Fault(path=f"{lacks}: {template}", reason=reason)
        if fault not in self.faults:
            self.faults.append(fault)

    def tensor(self, place: _Place, template: str) -> TensorPlan | None:
        sources = place.piece.sources
        inputs = tuple(
            (source.model, self.roles_at(place, index)[template].name) for index, source in enumerate(sources)
        )
        name = template if place.out_layer is None else layer_name(template, place.out_layer)
        infos = [self.checkpoints[model].tensors[tensor] for model, tensor in inputs]
        if len({info.shape for info in infos}) > 1:
            found = ", ".join(
                f"{model} {list(info.shape)}" for (model, _), info in zip(inputs, infos, strict=True)
            )
            self.faults.append(Fault(path=name, reason=f"the models differ in its shape: {found}"))
            return None
        base_name = place.piece.base_model or self.recipe.base_model
        models = [model for model, _ in inputs]
        base = models.index(base_name) if base_name in models else None
        is_float = all(info.dtype in TORCH_DTYPES for info in infos)
        native = TORCH_DTYPES.get(infos[base or 0].dtype)
        return TensorPlan(
            name=name,
            shape=infos[0].shape,
            dtype=(self.recipe.out_dtype or self.recipe.dtype or native) if is_float else None,
            inputs=inputs,
            base=base,
            method=self.method,
            shared=self.parameters(place, name, base, None),
            values=tuple(
                self.parameters(place, tensor, base, index) for index, (_, tensor) in enumerate(inputs)
            ),
            seed=self.recipe.evomerge.seed,
        )

    def parameters(
        self, place: _Place, tensor_name: str, base: int | None, index: int | None
    ) -> Mapping[str, bool | int | float | None]:
        """Values of the parameters of one input, or with None of those that all share."""
        key = (id(place.piece), base, index)
        if key in self.same:
            return self.same[key]
        source = None if index is None else place.piece.sources[index]
        scopes = (
            {Scope.RECIPE} if index is None else {Scope.MODEL, *([Scope.NON_BASE] if index != base else [])}
        )
        levels = [
            source.parameters if source is not None else None,
            place.piece.parameters,
            place.module.parameters if place.module is not None else None,
            self.recipe.parameters,
        ]
        wanted = [parameter for parameter in self.method.parameters if parameter.scope in scopes]
        found = {
            parameter.name: self.value(parameter, tensor_name, place, source, levels) for parameter in wanted
        }
        # Most settings are the same for all tensors of a slice, and looking them up again for every tensor
        # would take most of the time of planning.
        if all(_is_fixed(parameter, levels) for parameter in wanted):
            self.same[key] = found
        return found

    def value(
        self,
        parameter: Parameter,
        tensor_name: str,
        place: _Place,
        source: InputSlice | None,
        levels: Sequence[Parameters | None],
    ) -> bool | int | float | None:
        for level in levels:
            if level and parameter.name in level:
                try:
                    value = evaluate(
                        level[parameter.name], tensor_name=tensor_name, depth=place.depth, kind=parameter.kind
                    )
                except ValueError as error:  # a gradient of counts, between two of them
                    reason = f"{error} for the tensor {tensor_name}"
                    raise ConfigurationError(
                        self.recipe.fault(("parameters", parameter.name), reason)
                    ) from None
                if value is not None:
                    return parameter.check(value)
        if parameter.required:
            of = f" of {source.model}" if source is not None else ""
            reason = f"{self.method.name} requires it, but no setting{of} matches the tensor {tensor_name}"
            raise ConfigurationError(self.recipe.fault(("parameters", parameter.name), reason))
        return parameter.default


def _is_fixed(parameter: Parameter, levels: Sequence[Parameters | None]) -> bool:
    """Whether a parameter has one value for all tensors of a slice: a number without filter, or none at all."""
    setting = next((level[parameter.name] for level in levels if level and parameter.name in level), None)
    if setting is None:
        return not parameter.required
    return bool(setting) and setting[0].filter in (None, "*") and not isinstance(setting[0].value, list)
