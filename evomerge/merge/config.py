"""The config of a merged model: its donor's, with what the merge changes.

Some configs say by a rule, such as "every sixth", what each layer is. Where layers move, the rule would speak
of other layers, so the kind of each is written out as a list. A rule that has no such list is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.decoder import LAYER_COUNT_KEYS, text_config
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.plan import MergePlan

PER_LAYER_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Lists with an entry per layer. transformers derives one from the rules it replaces if a config lacks it."""

SPARSE_KEYS = ("mlp_only_layers", "decoder_sparse_step")
"""What says which layers of a mixture of experts have one MLP instead; see `is_dense`."""

_RULES_OF_LISTS = {
    "layer_types": ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"),
    "no_rope_layers": ("no_rope_layer_interval",),
}
"""List -> the rules that transformers ignores if the list is there; they go when layers move."""

_RULE = re.compile(
    r"_(period|interval|offset|step|pattern)$|_every_n_|^first_k_|layer_(idx|ids|indices)$|_layers$"
    r"|(attention|block)_types?$"
)


def merged_config(plan: MergePlan, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The donor's config with what every layer is, their number and the weight type of the merged model.

    Raises:
        CheckpointError: The layers change, but the config says their number or what they are in no known way.
    """
    donor = checkpoints[plan.donor]
    merged = {key: copy.deepcopy(value) for key, value in donor.config.items() if key != "_name_or_path"}
    nested = merged.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else merged
    depth = num_layers(donor.tensors)
    counts = [(part, key) for part in (merged, text) for key in LAYER_COUNT_KEYS if part.get(key) == depth]
    if not counts and plan.num_layers != depth:
        reason = f"states the number of layers in none of {', '.join(LAYER_COUNT_KEYS)}, so it cannot change"
        raise CheckpointError(Fault(path=f"{plan.donor}: config.json", reason=reason))
    for part, key in counts:
        part[key] = plan.num_layers
    _list_layers(text, plan, checkpoints, moved=plan.layers != tuple((plan.donor, i) for i in range(depth)))
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.dtype is not None}
    if len(dtypes) == 1:
        merged["dtype"] = merged["torch_dtype"] = dtypes.pop()
    return merged


def _list_layers(
    text: dict[str, Any], plan: MergePlan, checkpoints: Mapping[str, Checkpoint], *, moved: bool
) -> None:
    """Write out what each layer is.

    Args:
        text: The part of the merged config that describes the layers; changed in place.
        plan: The plan of the merge.
        checkpoints: Model -> its checkpoint.
        moved: Whether any layer is not the donor's own at its old place.
    """
    models = sorted({model for model, _ in plan.layers} | {plan.donor})
    configs = {model: text_config(checkpoints[model].config) for model in models}
    if moved:
        configs = {
            model: _lists_of_transformers(config) | {k: v for k, v in config.items() if v is not None}
            for model, config in configs.items()
        }
    for key in PER_LAYER_KEYS:
        if configs[plan.donor].get(key) is not None:
            text[key] = [_per_layer(configs[model], model, key, layer) for model, layer in plan.layers]
    if not moved:
        return
    for key, rules in _RULES_OF_LISTS.items():
        if isinstance(text.get(key), list):
            for rule in rules:
                text.pop(rule, None)
    if any(key in config for config in configs.values() for key in SPARSE_KEYS):
        dense = [is_dense(configs[model], layer) for model, layer in plan.layers]
        text["mlp_only_layers"] = [position for position, found in enumerate(dense) if found]
        text["decoder_sparse_step"] = 1
    _refuse_rules(text, plan, configs)


def _refuse_rules(text: Mapping[str, Any], plan: MergePlan, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a merged config in which some setting would speak of other layers than in the sources."""
    moved = any(layer != position for position, (_, layer) in enumerate(plan.layers))
    settled = {*LAYER_COUNT_KEYS, *PER_LAYER_KEYS, *SPARSE_KEYS}
    if not text.get("use_sliding_window") or isinstance(text.get("layer_types"), list):
        settled.add("max_window_layers")
    for key in sorted(text.keys() - settled):
        value = text[key]
        trivial = value in (None, 0, []) or (value == 1 and key.endswith(("interval", "step", "period")))
        if _RULE.search(key) and not (
            trivial if moved else all(c.get(key) == value for c in configs.values())
        ):
            reason = (
                f"{key}: {value!r} says what layers are by their number, but the merge moves layers; this is "
                f"supported for {', '.join(PER_LAYER_KEYS + SPARSE_KEYS)} only"
            )
            raise CheckpointError(Fault(path=f"{plan.donor}: config.json", reason=reason))


def is_dense(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a mixture of experts has one MLP instead, by the rule of Qwen's models."""
    step = config.get("decoder_sparse_step") or 1
    return layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % step != 0


def _lists_of_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The lists per layer that transformers derives from a config; none if it cannot read the config."""
    from transformers import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config()
    except Exception:  # A config class may raise anything; the explicit lists are used without its help.
        return {}
    return {key: list(found) for key in PER_LAYER_KEYS if (found := getattr(read, key, None)) is not None}


def _per_layer(config: Mapping[str, Any], name: str, key: str, layer: int) -> Any:
    values = config.get(key)
    if not isinstance(values, list) or layer >= len(values):
        reason = f"expected {key} to be a list with an entry for layer {layer}, got {values!r}"
        raise CheckpointError(Fault(path=f"{name}: config.json", reason=reason))
    return values[layer]
