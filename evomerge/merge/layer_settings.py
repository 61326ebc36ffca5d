"""What the config of a live model says of its layers, for any plan, as quickly as a search needs it.

`merged_config` writes the config of a merged checkpoint. Here the same is said to transformers' config object:
how many layers there are and what each of them is. Whether it can be said at all is asked of `merged_config`,
once for plans that do not differ in that.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.decoder import LAYER_COUNT_KEYS
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.config import PER_LAYER_KEYS, SPARSE_KEYS, is_dense, merged_config
from evomerge.merge.plan import MergePlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Layers = Sequence[tuple[str, int]]
"""Model and layer that each layer stems from."""

Settings = Mapping[str, Any]
"""Attribute of a config -> its value."""

_DENSE, _SPARSE_STEP = SPARSE_KEYS


class LayerSettings:
    """Settings of the layers of a live model.

    Args:
        model: The model, with the layers it was loaded with.
        checkpoints: Model as recipes name it -> its checkpoint.

    Attributes:
        own: The settings of the layers that the model was loaded with.
    """

    def __init__(self, model: PreTrainedModel, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._config = model.config
        self._checkpoints = checkpoints
        text = text_part(model.config)
        depth = getattr(text, LAYER_COUNT_KEYS[0])
        self._counts = [key for key in LAYER_COUNT_KEYS if getattr(text, key, None) == depth]
        self._lists = [key for key in PER_LAYER_KEYS if getattr(text, key, None) is not None]
        self._is_sparse = any(hasattr(text, key) for key in SPARSE_KEYS)
        self.own: Settings = self._settings([(self._read(text), layer) for layer in range(depth)])
        self._sources: dict[str, Settings] = {}
        self._accepted: set[Hashable] = set()

    def of_plan(self, plan: MergePlan) -> Settings:
        """The settings of a merged model.

        Raises:
            CheckpointError: A config cannot say what the layers are; see `merged_config`.
        """
        self._check(plan)
        return self.of_layers(plan.layers)

    def of_source(self, name: str) -> Settings:
        """The settings of a source.

        Raises:
            CheckpointError: As `of_plan`.
        """
        return self.of_layers([(name, layer) for layer in range(num_layers(self._checkpoints[name].tensors))])

    def of_layers(self, layers: Layers) -> Settings:
        """The settings of any layers in a row.

        Raises:
            CheckpointError: As `of_plan`.
        """
        sources = {name: self._source(name) for name, _ in layers}
        return self._settings([(sources[name], layer) for name, layer in layers])

    def kinds(self, settings: Settings) -> tuple[Hashable, ...]:
        """What the layers are, from first to last; those of one kind differ in nothing but weights and place."""
        dense = settings.get(_DENSE, ())
        return tuple(
            (place in dense, *(settings[key][place] for key in self._lists))
            for place in range(settings[self._counts[0]])
        )

    def _settings(self, layers: Sequence[tuple[Settings, int]]) -> Settings:
        found: dict[str, Any] = dict.fromkeys(self._counts, len(layers))
        for key in self._lists:
            found[key] = [source[key][layer] for source, layer in layers]
        if self._is_sparse:
            dense = [is_dense(source, layer) for source, layer in layers]
            found |= {_DENSE: [place for place, one in enumerate(dense) if one], _SPARSE_STEP: 1}
        return found

    def _read(self, text: PreTrainedConfig) -> Settings:
        return {key: getattr(text, key, None) for key in (*self._lists, *SPARSE_KEYS)}

    def _source(self, name: str) -> Settings:
        if name not in self._sources:
            checkpoint = self._checkpoints[name]
            found = self._read(text_part(type(self._config).from_dict(copy.deepcopy(checkpoint.config))))
            for key in self._lists:
                if len(found[key] or ()) != num_layers(checkpoint.tensors):
                    reason = f"expected {key} to have an entry for every layer, got {found[key]!r}"
                    raise CheckpointError(Fault(path=f"{name}: config.json", reason=reason))
            self._sources[name] = found
        return self._sources[name]

    def _check(self, plan: MergePlan) -> None:
        """Have `merged_config` refuse what it refuses; that depends on these properties of a plan alone."""
        own = [(plan.donor, layer) for layer in range(num_layers(self._checkpoints[plan.donor].tensors))]
        key = (
            plan.donor,
            frozenset(name for name, _ in plan.layers),
            len(plan.layers) == len(own),
            list(plan.layers) == own,
            all(layer == place for place, (_, layer) in enumerate(plan.layers)),
        )
        if key not in self._accepted:
            merged_config(plan, self._checkpoints)
            self._accepted.add(key)


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the decoder's layers."""
    return config.get_text_config(decoder=True)


def describe(config: PreTrainedConfig, settings: Settings) -> None:
    """Put settings into a config."""
    text = text_part(config)
    for key, value in settings.items():
        setattr(text, key, copy.copy(value))
