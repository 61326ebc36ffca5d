"""Encodes what prompts have in common once: the keys and values that attention computed for a common prefix.

Few-shot examples and instructions open all prompts of a task, and the choices of a document share its context. In a
decoder whose layers all attend to everything before them, keys and values of a prefix do not depend on what follows,
so one pass over it serves all prompts. Logits are those of whole prompts up to rounding, which in bfloat16 may turn a
close answer; announced numbers therefore never come from here (see `DocumentSet.exact`).

A prefix lives for one call only, as the weights change between calls. Legend: B sequences, T positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NEEDED = {"input_ids", "attention_mask", "position_ids", "past_key_values"}
"""What a model's forward pass must take, for positions to be given apart from the places in the cache."""
MOVING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings that depend on the length of the whole text."""
WINDOWS = ("window_size", "attention_types", "attention_layers")
"""Settings of models with windows that transformers' cache does not know of, such as GPT-Neo."""
MIN_TOKENS = 16
"""A shorter common prefix is not worth a pass of its own."""


def can_share(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix are all that what follows it needs.

    Layers with a sliding window or a recurrent state drop or fold what they have read, and count places where
    others count positions.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    if not inspect.signature(model.forward).parameters.keys() >= NEEDED or getattr(config, "alibi", False):
        return False
    if any(getattr(config, setting, None) for setting in WINDOWS):
        return False
    if any(f'"rope_type": "{kind}"' in config.to_json_string(use_diff=False) for kind in MOVING_ROPES):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def common_prefix(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all sequences begin with, but never a whole sequence, as logits come from what is left."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    end = 0
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    return first[: min(end, min(map(len, rows)) - 1)]


@dataclass(kw_only=True)
class Reading:
    """What a model has read of B sequences.

    Attributes:
        cache: Its keys and values.
        mask_BT: 1 where they belong to a sequence, 0 where they pad.
    """

    cache: Any
    mask_BT: Tensor

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the other sequences, layer by layer, so that little memory is needed beside."""
        import torch

        chosen = torch.tensor(rows, device=self.mask_BT.device)
        self.cache.batch_select_indices(chosen)
        self.mask_BT = self.mask_BT[chosen]

    def select(self, rows: Sequence[int]) -> Reading:
        """A copy of what was read of some sequences, each as often as named."""
        import torch

        chosen = torch.tensor(rows, device=self.mask_BT.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(chosen)
        return Reading(cache=cache, mask_BT=self.mask_BT[chosen])


class Prefix:
    """A prefix that a model has read.

    Args:
        model: The model.
        ids: The tokens; may be none.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        import torch

        self.ids = tuple(ids)
        self._model = model
        self._states: list[tuple[Tensor, Tensor]] = []
        if ids:
            reading = self._empty(1)
            read(model, torch.tensor([self.ids], device=model.device), reading, keep=1)
            self._states = [(layer.keys, layer.values) for layer in reading.cache.layers]

    def open(self, num_rows: int) -> Reading:
        """What the model knows of sequences of which it has read the prefix only."""
        reading = self._empty(num_rows)
        for layer, (keys, values) in zip(reading.cache.layers, self._states, strict=False):
            layer.update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1))
        return reading

    def read(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Reading]:
        """Read sequences that begin with the prefix.

        Returns:
            The logits BV behind the last token of each, and what was read.
        """
        import torch

        left = [row[len(self.ids) :] for row in rows]
        width = max(map(len, left))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in left], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in left], device=ids.device)
        reading = self.open(len(rows))
        logits = read(self._model, ids, reading, mask_BT=mask, keep=1)
        return logits[:, -1], reading

    def _empty(self, num_rows: int) -> Reading:
        import torch
        from transformers import DynamicCache

        mask = torch.ones(num_rows, len(self.ids) if self._states else 0, dtype=torch.long)
        return Reading(cache=DynamicCache(config=self._model.config), mask_BT=mask.to(self._model.device))


def read(
    model: PreTrainedModel, ids_BT: Tensor, reading: Reading, *, mask_BT: Tensor | None = None, keep: int = 0
) -> Tensor:
    """Read on.

    Args:
        model: The model.
        ids_BT: The next tokens of every sequence.
        reading: What was read so far; is extended.
        mask_BT: 0 where the next tokens pad.
        keep: How many logits of the last positions are wanted; 0 for all.

    Returns:
        The logits behind the tokens.
    """
    import torch

    mask = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    reading.mask_BT = torch.cat([reading.mask_BT, mask], dim=1)
    positions = (reading.mask_BT.cumsum(1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
    options = {"logits_to_keep": keep} if _takes_logits_to_keep(model) else {}
    with torch.no_grad():
        output = model(
            input_ids=ids_BT,
            attention_mask=reading.mask_BT,
            position_ids=positions,
            past_key_values=reading.cache,
            use_cache=True,
            **options,
        )
    logits: Tensor = output.logits
    return logits[:, -keep:]


def _takes_logits_to_keep(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
