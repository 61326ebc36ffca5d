"""Layers with weights of their own, for recipes of any depth in one live model.

The pool starts with the layers that the model was loaded with, and grows when a recipe needs more, never beyond
what the deepest one needed. Layers of another kind, such as those with a sliding window, are kept apart.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evomerge.checkpoints.architecture import layer_name
from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.layer_settings import LayerSettings
from evomerge.merge.layer_stack import LayerStack, configs, load_like
from evomerge.merge.live_mapping import LiveTensor
from evomerge.merge.plan import MergePlan

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(kw_only=True, eq=False)
class _Layer:
    """A layer, and the template of each of its tensors' names in a checkpoint -> view of its weights."""

    module: Module
    targets: Mapping[str, Tensor] = field(default_factory=dict)


class LayerPool:
    """The layers of a live model, as many of each kind as any recipe needed.

    Args:
        model: The model.
        checkpoints: Model as recipes name it -> its checkpoint.
    """

    def __init__(self, model: PreTrainedModel, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._model = model
        self._checkpoints = checkpoints
        self._settings = LayerSettings(model, checkpoints)
        self._present = self._settings.kinds(self._settings.own)
        self._stack: LayerStack | None = None
        self._pool: dict[Hashable, list[_Layer]] = defaultdict(list)
        self._outside: dict[str, Tensor] = {}

    def tensors(self) -> Iterator[Tensor]:
        """The weights of all layers that a recipe needed so far."""
        for layers in self._pool.values():
            for layer in layers:
                yield from layer.targets.values()

    def arrange(self, plan: MergePlan) -> dict[str, Tensor] | None:
        """Give the model the layers that a recipe describes; what they hold is left over from others.

        Args:
            plan: The planned recipe.

        Returns:
            Name of a tensor in a checkpoint -> view of the live parameter or buffer that holds it; or None if
            the model has such layers already.

        Raises:
            CheckpointError: The config cannot say what the layers are, or the model cannot take them.
        """
        settings = self._settings.of_plan(plan)
        wanted = self._settings.kinds(settings)
        if wanted == self._present:
            return None
        if self._stack is None:
            self._stack = LayerStack(self._model)
            for kind, module in zip(self._present, self._stack.layers, strict=True):
                self._pool[kind].append(_Layer(module=module))
            self._map()
        self._present = ()
        chosen: list[_Layer] = []
        used: dict[Hashable, int] = defaultdict(int)
        for place, kind in enumerate(wanted):
            if used[kind] == len(self._pool[kind]):
                self._pool[kind].append(_Layer(module=self._new(kind, plan.layers[place])))
            chosen.append(self._pool[kind][used[kind]])
            used[kind] += 1
        self._stack.put([layer.module for layer in chosen], settings)
        if not all(layer.targets for layer in chosen):
            self._map()
        self._present = wanted
        targets = dict(self._outside)
        for place, layer in enumerate(chosen):
            targets |= {layer_name(template, place): tensor for template, tensor in layer.targets.items()}
        return targets

    def _new(self, kind: Hashable, origin: tuple[str, int]) -> Module:
        """A layer of a kind, with memory of its own."""
        import torch

        device = self._model.device
        if self._pool[kind]:
            pattern = self._pool[kind][0].module
            memo = configs(self._model.config, self._model.config)
        else:
            name, number = origin
            loaded = load_like(self._model, self._checkpoints[name], self._settings.of_source(name))
            pattern = LayerStack(loaded).layers[number]
            memo = configs(loaded.config, self._model.config)
        # A buffer may be a view of a whole file, all of which a deep copy would copy.
        memo |= {id(buffer): torch.clone(buffer) for buffer in pattern.buffers()}
        return copy.deepcopy(pattern, memo).to(device)

    def _map(self) -> None:
        """Find where the tensors of a checkpoint lie in the present layers, and outside them."""
        assert self._stack is not None
        outside, layers = self._stack.tensors()
        self._outside = _parts(outside)
        by_module = {layer.module: layer for kind in self._pool.values() for layer in kind}
        for place, (module, tensors) in enumerate(zip(self._stack.layers, layers, strict=True)):
            by_module[module].targets = {
                name.replace(f".{place}.", ".{}.", 1): part for name, part in _parts(tensors).items()
            }


def _parts(tensors: list[LiveTensor]) -> dict[str, Tensor]:
    return {name: part for tensor in tensors for name, part in tensor.parts.items()}
