"""What a recipe says of every module of the merged model.

    modules: the module's own models or slices ─┐
    models:  the same for every module ─────────┼─► slices of every module
    slices:  for the only module ───────────────┤
    left out ─► the donor's module ─────────────┘

The donor gives config and tokenizer. A plain language model takes part in the language model of larger ones.

mergekit has other names where it has no definition of an architecture: it calls the layers of a module as their
tensors are, `model.text_model.layers`, and everything outside of all layers `default`. A recipe in these names says
in two places what becomes of a module, and each gives an output module here, one of the layers and one of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, ConfigurationError, Fault, nearest
from evomerge.merge.layout import Layout, depth_of, modules_of
from evomerge.recipe import InputModel, InputSlice, Module, OutputSlice, Parameters, Recipe
from evomerge.yaml_file import FieldPath


@dataclass(frozen=True, kw_only=True)
class OutputModule:
    """One module of the merged model.

    Attributes:
        name: Its name, or `default` for the only one.
        key: What the recipe calls it, or would.
        is_rest: Whether it is but what lies outside of the layers of a module that has some.
        layouts: Model -> its tensors, for every model that has the module.
        pieces: Its slices, each with the base model that counts there.
        parameters: What holds for all of its tensors, nearest first.
        is_left_out: Whether the recipe does not speak of it, so that it is the donor's.
    """

    name: str
    key: str
    is_rest: bool
    layouts: Mapping[str, Layout]
    pieces: tuple[OutputSlice, ...]
    parameters: tuple[Parameters, ...]
    is_left_out: bool

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Model and layer that each layer stems from in the first place: the base's, or the first source's."""
        return tuple(
            (source.model, layer)
            for piece in self.pieces
            for source in [next((s for s in piece.sources if s.model == piece.base_model), piece.sources[0])]
            for layer in range(*source.layer_range)
        )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Tensors of which a recipe speaks in one place.

    Attributes:
        module: Whose they are.
        key: The place under 'modules'.
        layers: Whether those in its layers are among them.
        outside: Whether those outside of its layers are.
    """

    module: str
    key: str
    layers: bool = True
    outside: bool = True

    def of(self, layout: Layout) -> Layout:
        """The tensors of a model."""
        return {
            layer: roles
            for layer, roles in layout.items()
            if (self.outside if layer is None else self.layers)
        }


class ModelModules:
    """The modules of a recipe's models.

    Args:
        recipe: The recipe.
        checkpoints: Model as the recipe names it -> its checkpoint.

    Attributes:
        names: The modules of the merged model.
        donor: The model that gives the merged model its config and tokenizer: the first with all modules,
            the base model before the others.

    Raises:
        CheckpointError: A model cannot be understood, or none has all modules.
    """

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._recipe = recipe
        self._form = "modules" if recipe.modules else "slices" if recipe.slices else "models"
        base = [recipe.base_model] if recipe.base_model is not None else []
        self._models: dict[str, Mapping[str, Layout]] = {}
        for model in dict.fromkeys((*base, *recipe.model_names)):
            try:
                self._models[model] = modules_of(checkpoints[model])
            except ValueError as error:
                raise CheckpointError(Fault(path=model, reason=str(error))) from None
        found = {*(recipe.modules or ()), *(name for modules in self._models.values() for name in modules)}
        if TEXT_DECODER in found:
            for model, modules in self._models.items():
                self._models[model] = {
                    TEXT_DECODER if name == DEFAULT else name: layout for name, layout in modules.items()
                }
        every = {name for modules in self._models.values() for name in modules}
        complete = [model for model, modules in self._models.items() if len(modules) == len(every)]
        if not complete:
            listed = "; ".join(f"{model}: {', '.join(modules)}" for model, modules in self._models.items())
            reason = f"expected a model with all the modules of the others, found {listed}"
            raise CheckpointError(recipe.fault((self._form,), reason))
        self.donor = complete[0]
        self.names = tuple(self._models[self.donor])

    def output_modules(self) -> tuple[OutputModule, ...]:
        """What the recipe says of every module.

        Raises:
            ConfigurationError: It names a module that does not exist, or says `slices` of several modules.
            CheckpointError: A model lacks a module, or layers of it.
        """
        recipe, parts = self._recipe, self._parts()
        keys = list(dict.fromkeys(part.key for part in parts))
        known = ", ".join(keys)
        if recipe.slices is not None and len(self.names) > 1:
            reason = f"the models have several modules, {known}; say under 'modules' whose slices these are"
            raise ConfigurationError(recipe.fault(("slices",), reason))
        faults = [
            recipe.fault(("modules", name), f"unknown module{nearest(name, keys)}; the models have {known}")
            for name in recipe.modules or ()
            if name not in keys
        ]
        if faults:
            raise ConfigurationError(faults)
        faults = [fault for part in parts for fault in self._missing(part)]
        if faults:
            raise CheckpointError(faults)
        return tuple(self._module(part) for part in parts)

    def language_model(self) -> tuple[OutputSlice, ...]:
        """The slices that its embedding comes from; none if it is no module by itself. Raises as `output_modules`."""
        modules = self.output_modules()
        return next((module.pieces for module in modules if module.name in (DEFAULT, TEXT_DECODER)), ())

    def _parts(self) -> list[_Part]:
        """What the recipe speaks of in one place each: the modules, or what mergekit infers them to be."""
        said = {_plain(name): name for name in self._recipe.modules or ()}
        found = {name: _stack(layout) for name, layout in self._models[self.donor].items()}
        stacks = {name: stack and said.get(_plain(stack), stack) for name, stack in found.items()}
        if not set(said.values()) & set(stacks.values()):
            return [_Part(module=name, key=name) for name in self.names]
        parts = []
        for name, stack in stacks.items():
            parts.append(_Part(module=name, key=DEFAULT, layers=stack is None))
            if stack is not None:
                parts.append(_Part(module=name, key=stack, outside=False))
        return parts

    def _holder(self, part: _Part) -> tuple[FieldPath, Recipe | Module | None]:
        """Where the recipe speaks of a part, and what it says."""
        if self._recipe.modules is None:
            return (), self._recipe
        return ("modules", part.key), self._recipe.modules.get(part.key)

    def _missing(self, part: _Part) -> Iterator[Fault]:
        name = part.module
        place, holder = self._holder(part)
        if holder is None:
            return
        named = [model.model for model in self._inputs(holder)]
        named += [source.model for piece in holder.slices or () for source in piece.sources]
        for model in dict.fromkeys(named):
            if name not in self._models[model]:
                reason = f"{model} has no module {name}, only {', '.join(self._models[model])}"
                advice = "; leave it out, or say under 'modules' which models give it"
                yield self._recipe.fault((*place, "slices" if holder.slices else "models"), reason + advice)

    def _inputs(self, holder: Recipe | Module) -> list[InputModel]:
        """The models of the `models` form, with the base model."""
        models = list(holder.models or ())
        base = self._recipe.base_model
        if models and base is not None and all(model.model != base for model in models):
            models.append(InputModel(model=base))
        return models

    def _module(self, part: _Part) -> OutputModule:
        place, holder = self._holder(part)
        name = part.module
        layouts = {
            model: part.of(modules[name]) for model, modules in self._models.items() if name in modules
        }
        depths = {model: depth_of(layout) for model, layout in layouts.items()}
        levels: list[Parameters | None] = []
        if holder is None:
            pieces = [self._whole(place, [InputModel(model=self.donor)], depths)]
        else:
            levels = [holder.parameters, *([self._recipe.parameters] if isinstance(holder, Module) else [])]
            pieces = self._sliced(place, holder.slices, depths) if holder.slices else []
            base = self._recipe.base_model
            pieces = pieces or [self._whole(place, self._inputs(holder), depths)]
            pieces = [piece.model_copy(update={"base_model": piece.base_model or base}) for piece in pieces]
        return OutputModule(
            name=name,
            key=part.key,
            is_rest=not part.layers,
            layouts=layouts,
            pieces=tuple(pieces),
            parameters=tuple(level for level in levels if level),
            is_left_out=holder is None,
        )

    def _whole(
        self, place: FieldPath, models: Sequence[InputModel], depths: Mapping[str, int]
    ) -> OutputSlice:
        """Whole models as one slice."""
        found = {model.model: depths[model.model] for model in models}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{model} {depth}" for model, depth in found.items())
            reason = f"the models differ in their number of layers: {listed}"
            raise CheckpointError(self._recipe.fault((*place, "models"), reason))
        sources = [
            # Not checked again: a module may have no layers.
            InputSlice.model_construct(
                model=model.model, layer_range=(0, depths[model.model]), parameters=model.parameters
            )
            for model in models
        ]
        return OutputSlice.model_construct(sources=sources, base_model=None, parameters=None)

    def _sliced(
        self, place: FieldPath, pieces: Sequence[OutputSlice], depths: Mapping[str, int]
    ) -> list[OutputSlice]:
        if len(pieces) == 1 and all(
            depths[source.model] == source.layer_range[0] == 0 for source in pieces[0].sources
        ):
            return [_without_layers(pieces[0])]
        for number, piece in enumerate(pieces):
            for source in piece.sources:
                depth = depths[source.model]
                if not 0 < source.layer_range[1] <= depth:
                    where = (*place, "slices", number, "sources")
                    reason = f"{source.model} has {depth} layers, got layer_range {list(source.layer_range)}"
                    raise CheckpointError(self._recipe.fault(where, reason))
        return list(pieces)


def _without_layers(piece: OutputSlice) -> OutputSlice:
    """The slice of a module without layers; to mergekit, the matrices of a projector can be such."""
    sources = [source.model_copy(update={"layer_range": (0, 0)}) for source in piece.sources]
    return piece.model_copy(update={"sources": sources})


def _stack(layout: Layout) -> str | None:
    """What the names of a module's layers have in common, `model.layers`; None if it has none."""
    for layer, roles in layout.items():
        if layer is not None:
            return next(iter(roles.values())).template.partition(".{}.")[0]
    return None


def _plain(stack: str) -> str:
    """The same for the names in a file and those of the model that transformers makes of it, which mergekit takes."""
    return ".".join(piece for piece in stack.split(".") if piece not in ("model", "vision_model"))
