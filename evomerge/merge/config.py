"""The config of a merged model: its donor's, with what the merge changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.plan import MergePlan

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PER_LAYER_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def merged_config(plan: MergePlan, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The donor's config with what every layer is, their number and the weight type of the merged model.

    Raises:
        CheckpointError: The number of layers changes, but the config does not say it in a known place.
    """
    merged = {key: value for key, value in checkpoints[plan.donor].config.items() if key != "_name_or_path"}
    counts = [key for key in LAYER_COUNT_KEYS if key in merged]
    if not counts and plan.num_layers != num_layers(checkpoints[plan.donor].tensors):
        reason = f"states the number of layers in none of {', '.join(LAYER_COUNT_KEYS)}, so it cannot change"
        raise CheckpointError(Fault(path=f"{plan.donor}: config.json", reason=reason))
    merged |= dict.fromkeys(counts, plan.num_layers)
    for key in PER_LAYER_KEYS:
        if merged.get(key) is not None:
            merged[key] = [_per_layer(checkpoints[model], model, key, layer) for model, layer in plan.layers]
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.dtype is not None}
    if len(dtypes) == 1:
        merged["dtype"] = merged["torch_dtype"] = dtypes.pop()
    return merged


def _per_layer(checkpoint: Checkpoint, name: str, key: str, layer: int) -> Any:
    values = checkpoint.config.get(key)
    if not isinstance(values, list) or layer >= len(values):
        reason = f"expected {key} to be a list with an entry for layer {layer}, got {values!r}"
        raise CheckpointError(Fault(path=f"{name}: config.json", reason=reason))
    return values[layer]
