"""Recipe + models -> one operation per output tensor.

Planning reads names, shapes and types only, never weights. `parameter_values` looks up the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evomerge.checkpoints.architecture import TensorRole, before_layers, layer_name
from evomerge.checkpoints.decoder import text_config
from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, ConfigurationError, Fault, nearest
from evomerge.merge.layout import depth_of
from evomerge.merge.methods import METHODS, Method
from evomerge.merge.output_modules import ModelModules, OutputModule
from evomerge.merge.parameter_values import ParameterValues
from evomerge.recipe import OutputSlice, Recipe

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
        rescale: (factor, offset) if the merged tensor w becomes factor * (offset + w) - offset, else None.
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
    rescale: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ModulePlan:
    """A module of the merged model.

    Attributes:
        name: Its name, `default` for the only one.
        layers: For every layer, the model and layer it stems from in the first place: the base's, or the
            first source's.
    """

    name: str
    layers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """The operations of a recipe.

    Attributes:
        tensors: One plan per output tensor, sorted by name.
        modules: The modules of the merged model.
        donor: The model that gives config and tokenizer: the first with all modules, the base before others.
        warnings: What is unusual but not wrong.
    """

    tensors: tuple[TensorPlan, ...]
    modules: tuple[ModulePlan, ...]
    donor: str
    warnings: tuple[Fault, ...]

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """The layers of the language model, if it is a module, else of all modules."""
        main = [module for module in self.modules if module.name in (DEFAULT, TEXT_DECODER)]
        return tuple(layer for module in main or self.modules for layer in module.layers)

    @property
    def num_layers(self) -> int:
        """Number of these layers."""
        return len(self.layers)

    @property
    def is_path(self) -> bool:
        """Whether every tensor is that of one model, at most scaled: a path through the models' layers."""
        return all(tensor.method is METHODS["passthrough"] for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where in the merged model a tensor lies: its slice, its depth there, and whose layers it takes."""

    piece: OutputSlice
    depth: float
    layers: tuple[int | None, ...]
    out_layer: int | None

    @cached_property
    def base(self) -> int | None:
        """Position of the base among the sources."""
        models = [source.model for source in self.piece.sources]
        return models.index(self.piece.base_model) if self.piece.base_model in models else None


def plan_merge(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> MergePlan:
    """Plan every output tensor of a recipe that `check_recipe` accepted.

    Args:
        recipe: The recipe.
        checkpoints: Model as the recipe names it -> its checkpoint.

    Raises:
        CheckpointError: The models do not fit together; names tensors, models and shapes.
        ConfigurationError: A parameter has no value for some tensor, or the recipe names an unknown module.
    """
    models = ModelModules(recipe, checkpoints)
    modules = models.output_modules()
    planned: list[TensorPlan] = []
    faults: list[Fault] = []
    for module in modules:
        planner = _Planner(recipe, checkpoints, module, models.donor)
        planned += planner.tensors()
        faults += planner.faults
    if faults:
        raise CheckpointError(faults[:MAX_FAULTS])
    tensors = tuple(sorted(planned, key=lambda tensor: tensor.name))
    if faults := list(_scale_faults(recipe, tensors)):
        raise ConfigurationError(faults[:MAX_FAULTS])
    return MergePlan(
        tensors=tensors,
        modules=tuple(
            ModulePlan(name=module.name, layers=module.layers) for module in modules if not module.is_rest
        ),
        donor=models.donor,
        warnings=tuple(_left_out(recipe, modules, models.donor)),
    )


class _Planner:
    """Plans the tensors of one module."""

    def __init__(
        self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], module: OutputModule, donor: str
    ) -> None:
        self.recipe = recipe
        self.checkpoints = checkpoints
        self.layouts = module.layouts
        self.pieces = module.pieces
        self.method = METHODS["passthrough" if module.is_left_out else recipe.merge_method]
        self.parameters = ParameterValues(recipe, self.method, module.parameters)
        self.rescales = {scale.tensor: (scale.factor, scale.offset) for scale in recipe.evomerge.scales}
        self.donor = module.layouts[donor]
        # A language model's config says of every layer what it is, and goes with it; see `layer_settings`.
        self.has_fixed_places = module.name not in (DEFAULT, TEXT_DECODER)
        self.names = {key: role.template for roles in self.donor.values() for key, role in roles.items()}
        self.faults: list[Fault] = []

    def tensors(self) -> Iterator[TensorPlan]:
        yield from self.outside_layers(self.pieces[0], before=True)
        out_layer = 0
        for piece in self.pieces:
            for offset in range(piece.num_layers):
                place = _Place(
                    piece=piece,
                    depth=offset / (piece.num_layers - 1) if piece.num_layers > 1 else 1.0,
                    layers=tuple(source.layer_range[0] + offset for source in piece.sources),
                    out_layer=out_layer,
                )
                roles = [self.roles_at(place, i) for i in range(len(place.layers))]
                if self.has_fixed_places:
                    self.check_place(place, out_layer, roles[0])
                yield from self.at(place, roles)
                out_layer += 1
        yield from self.outside_layers(self.pieces[-1], before=False)

    def check_place(self, place: _Place, out_layer: int, roles: Mapping[str, TensorRole]) -> None:
        """Note a layer that has other tensors than the donor's in its place, or its last if there is none."""
        expected = self.donor[min(out_layer, depth_of(self.donor) - 1)]
        differing = sorted(roles.keys() ^ expected.keys())
        if differing:
            model, layer = place.piece.sources[0].model, place.layers[0]
            verb = "has" if differing[0] in roles else "lacks"
            reason = f"layer {layer} of {model} {verb} it, unlike the layer whose place it takes, number {out_layer}"
            self.faults.append(Fault(path=layer_name(differing[0], out_layer), reason=reason))

    def outside_layers(self, piece: OutputSlice, *, before: bool) -> Iterator[TensorPlan]:
        place = _Place(piece=piece, depth=0.0, layers=(None,) * len(piece.sources), out_layer=None)
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
        common = set(roles[0]).intersection(*roles[1:])
        for template in roles[0]:
            if template in common:
                plan = self.tensor(place, template, [others[template] for others in roles])
                if plan is not None:
                    yield plan

    def missing(self, template: str, *, lacks: str, has: str) -> None:
        reason = f"missing, but {has} has it; sources must share one architecture"
        if text_config(self.checkpoints[lacks].config).get("tie_word_embeddings") and "{}" not in template:
            reason += " (this model ties its output head to its embedding)"
        fault = Fault(path=f"{lacks}: {template}", reason=reason)
        if fault not in self.faults:
            self.faults.append(fault)

    def tensor(self, place: _Place, template: str, roles: Sequence[TensorRole]) -> TensorPlan | None:
        """Plan one tensor, given its role in every source."""
        sources, base = place.piece.sources, place.base
        inputs = tuple((source.model, role.name) for source, role in zip(sources, roles, strict=True))
        own_name = self.names.get(template, roles[0].template)
        name = own_name if place.out_layer is None else layer_name(own_name, place.out_layer)
        infos = [self.checkpoints[model].tensors[tensor] for model, tensor in inputs]
        if len({info.shape for info in infos}) > 1:
            found = ", ".join(
                f"{model} {list(info.shape)}" for (model, _), info in zip(inputs, infos, strict=True)
            )
            self.faults.append(Fault(path=name, reason=f"the models differ in its shape: {found}"))
            return None
        is_float = {info.dtype for info in infos} <= TORCH_DTYPES.keys()
        native = TORCH_DTYPES.get(infos[base or 0].dtype)
        shared, values = self.parameters.of(place.piece, name, inputs, base=base, depth=place.depth)
        return TensorPlan(
            name=name,
            shape=infos[0].shape,
            dtype=(self.recipe.out_dtype or self.recipe.dtype or native) if is_float else None,
            inputs=inputs,
            base=base,
            method=self.method,
            shared=shared,
            values=values,
            seed=self.recipe.evomerge.seed,
            rescale=self.rescales.get(name),
        )


def _left_out(recipe: Recipe, modules: Sequence[OutputModule], donor: str) -> Iterator[Fault]:
    names = dict.fromkeys(module.key for module in modules if module.is_left_out)
    if names:
        reason = f"does not speak of {', '.join(names)}, so the merged model gets {donor}'s as they are"
        yield recipe.fault(("modules",), f"{reason}; mergekit would write a model without them")


def _scale_faults(recipe: Recipe, tensors: Sequence[TensorPlan]) -> Iterator[Fault]:
    """What keeps merged tensors from being scaled."""
    planned = {tensor.name: tensor for tensor in tensors} if recipe.evomerge.scales else {}
    for number, scale in enumerate(recipe.evomerge.scales):
        place = ("evomerge", "scales", number, "tensor")
        tensor = planned.get(scale.tensor)
        if tensor is None:
            reason = f"the merged model has no tensor {scale.tensor!r}{nearest(scale.tensor, planned)}"
            yield recipe.fault(place, reason)
        elif tensor.dtype is None:
            yield recipe.fault(place, f"{scale.tensor!r} is copied, not merged, so it cannot be scaled")
