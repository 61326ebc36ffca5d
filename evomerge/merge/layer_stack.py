"""The list of layers of a live model, exchanged for every candidate, and what its config says of them.

transformers reads the number of layers, and for some architectures what each of them is, from the config
whenever it makes a mask or a cache; so the config goes with the layers. Whose weights the layers hold is left
to `live.py` and `views.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.checkpoints.architecture import classify
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.layer_settings import Settings, describe, text_part
from evomerge.merge.live_mapping import LiveTensor, live_tensors

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel


class LayerStack:
    """The layers of a live model.

    Args:
        model: The model.

    Attributes:
        model: That model.

    Raises:
        CheckpointError: Its layers are no plain list of modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        import torch

        self.model = model
        roles = classify(model.state_dict(keep_vars=True)).values()
        template = next((role.template for role in roles if role.layer is not None), "")
        self._name = template.partition(".{}.")[0]
        found = model.get_submodule(self._name)
        if not isinstance(found, torch.nn.ModuleList):
            reason = (
                f"expected a list of layers, found {type(found).__name__}; its layers cannot be exchanged"
            )
            raise CheckpointError(Fault(path=self._name, reason=reason))
        self._list = found
        inside = set(found.modules())
        self._outside = [module for module in model.modules() if module not in inside]
        self._numbered: dict[Module, list[Module]] = {}

    @property
    def layers(self) -> list[Module]:
        """The present layers."""
        return list(self._list)

    def clear(self) -> None:
        """Take the layers out, so that nothing here keeps their weights in memory."""
        del self._list[:]

    def put(self, layers: Sequence[Module], settings: Settings) -> None:
        """Make these the layers of the model, each at its place: with its own slot in a cache.

        Args:
            layers: The layers, none of them twice.
            settings: What the config is to say of them.

        Raises:
            CheckpointError: The model's other modules are not made for a layer of some type.
        """
        types = settings.get("layer_types", ())
        for module in self._outside:
            known = vars(module).get("layer_types")
            if known is not None and not set(types) <= set(known):
                odd = ", ".join(sorted(set(types) - set(known)))
                reason = f"holds no layer of type {odd}, so it cannot take one; name a model that does first"
                raise CheckpointError(Fault(path=str(self.model.name_or_path), reason=reason))
            if "has_sliding_layers" in vars(module):
                module.has_sliding_layers = "sliding_attention" in types
        self.clear()
        self._list.extend(layers)
        for place, layer in enumerate(layers):
            if layer not in self._numbered:
                self._numbered[layer] = [part for part in layer.modules() if "layer_idx" in vars(part)]
            for part in self._numbered[layer]:
                # Modules take ten times as long to set a number themselves.
                vars(part)["layer_idx"] = place
        describe(self.model.config, settings)

    def tensors(self) -> tuple[list[LiveTensor], list[list[LiveTensor]]]:
        """The model's tensors outside its layers, and those of each layer under their names within it.

        Raises:
            CheckpointError: The model holds its weights in a form that a checkpoint cannot be written to, or
                several layers share a tensor.
        """
        outside: list[LiveTensor] = []
        layers: list[list[LiveTensor]] = [[] for _ in self._list]
        start = f"{self._name}."
        for tensor in live_tensors(self.model):
            inside = [name.removeprefix(start) for name in tensor.names if name.startswith(start)]
            if not inside:
                outside.append(tensor)
                continue
            places = {int(name.partition(".")[0]) for name in inside}
            if len(places) > 1 or len(inside) < len(tensor.names):
                reason = f"shares its memory with {', '.join(tensor.names[1:])}; such layers cannot be moved"
                raise CheckpointError(Fault(path=tensor.names[0], reason=reason))
            names = tuple(name.partition(".")[2] for name in inside)
            layers[places.pop()].append(LiveTensor(names=names, tensor=tensor.tensor, parts=tensor.parts))
        return outside, layers


def configs(theirs: PreTrainedConfig, ours: PreTrainedConfig) -> dict[int, object]:
    """What a deep copy of a module needs as `memo` to refer to another model's config, and not to its own."""
    return {id(theirs): ours, id(text_part(theirs)): text_part(ours)}


def load_like(model: PreTrainedModel, checkpoint: Checkpoint, settings: Settings) -> PreTrainedModel:
    """Load a source into memory, its layers as they would be in the live model.

    That is, with the config of the live model, apart from what each layer is. Where the weights are stored in
    the live model's type they are views of the file, which take no memory.

    Args:
        model: The live model.
        checkpoint: The source.
        settings: What its layers are.

    Returns:
        The source, on the CPU. Weights that it lacks or that do not fit are random.
    """
    config = copy.deepcopy(model.config)
    describe(config, settings)
    loaded, _ = type(model).from_pretrained(
        checkpoint.folder,
        config=config,
        dtype=model.config.dtype,
        attn_implementation=model.config._attn_implementation,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    loaded.eval()
    return loaded
