"""Passthrough recipe -> a live model made of views of the sources' layers, without copies of their weights.

    plan ─► hops (source, layer, occurrence) ─► pooled views, put in order ─► scales ─► live model
                                                weights shared                multipliers

A view is a copy of a layer's module objects that shares its parameters; it has its own place, and with it its
own slot in a cache. Views are pooled, and put in their places anew for every candidate. A scale is a multiplier
on what a module gives; only where that cannot be, as in norms, a scaled copy is made of the tensor. Without
scales the model computes bit for bit what the exported checkpoint does.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.bank import Bank
from evomerge.merge.execute import merge_tensor
from evomerge.merge.layer_settings import LayerSettings
from evomerge.merge.layer_stack import LayerStack, configs, load_like
from evomerge.merge.plan import MAX_FAULTS, MergePlan, TensorPlan
from evomerge.merge.seats import Seats, is_scaled, not_finite
from evomerge.merge.view_sources import Form, Held, Source, SourceLayer, hold

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from transformers import PreTrainedModel


class PathModel:
    """A resident model that takes its layers from the sources, anew for every candidate.

    The sources are held whole: memory-mapped on the CPU, elsewhere whatever the bank's budget is.

    Args:
        model: The transformers model. It loses its layers until the first recipe is written.
        checkpoints: Model as recipes name it -> its checkpoint.

    Attributes:
        model: That model.

    Raises:
        CheckpointError: Its layers cannot be exchanged.
    """

    def __init__(self, model: PreTrainedModel, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.model = model
        self._checkpoints = checkpoints
        self._settings = LayerSettings(model, checkpoints)
        self._stack = LayerStack(model)
        outside, _ = self._stack.tensors()
        self._outside = [Form.of(live) for live in outside]
        self._form_of = {name: form for form in self._outside for name in form.parts}
        self._seats = Seats(model, [name for form in self._outside for name in form.names])
        self._stack.clear()
        self._held: dict[tuple[object, ...], Held] = {}
        self._sources: dict[tuple[str, torch.dtype | None], Source] = {}
        self._views: dict[tuple[SourceLayer, int], _View] = {}
        self._scaled: list[Seats] = []

    def write(self, plan: MergePlan, bank: Bank) -> None:
        """Make the model the one that a recipe describes.

        Args:
            plan: The planned recipe, all of whose tensors are passed through (`MergePlan.is_path`).
            bank: The sources, on the model's device.

        Raises:
            CheckpointError: The plan and the model do not cover each other.
            NonFiniteWeightsError: A merged tensor is not finite; the model then holds a partial candidate.
        """
        while self._scaled:
            self._scaled.pop().restore()
        settings = self._settings.of_plan(plan)
        rounding = _rounding(plan)
        sources = {model: self._source(model, rounding, bank) for model, _ in plan.layers}
        outside: list[TensorPlan] = []
        inside: dict[int, list[TensorPlan]] = {}
        for tensor in plan.tensors:
            model, name = tensor.inputs[0]
            source = sources[model]
            if name not in source.names:
                outside.append(tensor)
            elif is_scaled(tensor):
                place = int(tensor.name[len(source.prefix) :].partition(".")[0])
                inside.setdefault(place, []).append(tensor)
        self._seat_outside(outside, rounding, bank)
        views = self._views_of(plan, sources, bank)
        for place, tensors in inside.items():
            view = views[place]
            changes = [(view.layer.tensors[tensor.inputs[0][1]], tensor) for tensor in tensors]
            self._scale(view.seats, changes, bank)
        self._stack.put([view.module for view in views], settings)

    def _source(self, model: str, rounding: torch.dtype | None, bank: Bank) -> Source:
        key = model, rounding
        if key not in self._sources:
            loaded = load_like(self.model, self._checkpoints[model], self._settings.of_source(model))
            self._sources[key] = Source(model, loaded, self._checkpoints[model], bank, rounding)
        return self._sources[key]

    def _views_of(self, plan: MergePlan, sources: Mapping[str, Source], bank: Bank) -> list[_View]:
        """A view for every hop."""
        views = []
        occurrences: Counter[SourceLayer] = Counter()
        for model, number in plan.layers:
            layer = sources[model].layers[number]
            if layer.flawed is not None:
                raise not_finite(plan.tensors, (model, layer.flawed), bank)
            key = layer, occurrences[layer]
            occurrences[layer] += 1
            if key not in self._views:
                self._views[key] = _View.of(layer, configs(sources[model].config, self.model.config))
            views.append(self._views[key])
        return views

    def _seat_outside(self, plans: Sequence[TensorPlan], rounding: torch.dtype | None, bank: Bank) -> None:
        """Take embedding, final norm and head from the ends of the path."""
        filled: dict[Form, dict[str, TensorPlan]] = {form: {} for form in self._outside}
        faults = []
        for plan in plans:
            form = self._form_of.get(plan.name)
            if form is None:
                faults.append(Fault(path=plan.name, reason="the loaded model has no parameter of this name"))
                continue
            same = (name for name in filled[form] if form.parts[name] == form.parts[plan.name])
            tied = next(same, None)
            if tied is None:
                filled[form][plan.name] = plan
            elif not _merge_alike(filled[form][tied], plan, bank):
                reason = f"the model ties it to {tied}, but the recipe merges the two differently"
                faults.append(Fault(path=plan.name, reason=reason))
        for form, parts in filled.items():
            faults += form.faults({name: plan.shape for name, plan in parts.items()})
        if faults:
            raise CheckpointError(faults[:MAX_FAULTS])
        for form, parts in filled.items():
            held = self._hold(form, parts, rounding, bank)
            if held.flawed is not None:
                raise not_finite(plans, (next(iter(parts.values())).inputs[0][0], held.flawed), bank)
            self._seats.put(held)
            self._scale(self._seats, [(held, plan) for plan in parts.values() if is_scaled(plan)], bank)

    def _hold(
        self, form: Form, parts: Mapping[str, TensorPlan], rounding: torch.dtype | None, bank: Bank
    ) -> Held:
        keys = {name: plan.inputs[0] for name, plan in parts.items()}
        known = (form, rounding, *keys.items())
        if known not in self._held:
            # What is outside the layers stems from one end of the path, so from one model.
            ((model, _), *_) = keys.values()
            filled = {name: tensor for name, (_, tensor) in keys.items()}
            self._held[known] = hold(form, filled, model, self._checkpoints[model], bank, rounding)
        return self._held[known]

    def _scale(self, seats: Seats, changes: Sequence[tuple[Held, TensorPlan]], bank: Bank) -> None:
        if changes:
            self._scaled.append(seats)
            seats.scale(changes, bank)


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """A copy of a layer's module objects that shares its weights."""

    layer: SourceLayer
    module: Module
    seats: Seats

    @classmethod
    def of(cls, layer: SourceLayer, memo: Mapping[int, object]) -> _View:
        pattern = layer.module
        shared = {id(tensor): tensor for tensor in (*pattern.parameters(), *pattern.buffers())}
        module = copy.deepcopy(pattern, {**memo, **shared})
        names = dict.fromkeys(name for held in layer.tensors.values() for name in held.form.names)
        return cls(layer=layer, module=module, seats=Seats(module, names))


def _rounding(plan: MergePlan) -> torch.dtype | None:
    """The type that all weights are rounded to, or None if they stay in several."""
    import torch

    dtypes = {tensor.dtype for tensor in plan.tensors} - {None}
    if len(dtypes) != 1:
        return None
    found: torch.dtype = getattr(torch, str(dtypes.pop()))
    return found


def _merge_alike(one: TensorPlan, other: TensorPlan, bank: Bank) -> bool:
    import torch

    return torch.equal(merge_tensor(one, bank), merge_tensor(other, bank))
