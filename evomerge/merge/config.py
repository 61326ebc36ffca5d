"""The config of a merged model: its donor's, with what the merge changes.

Some configs say by a rule, such as "every sixth", what each layer is. Where layers move, the rule would speak
of other layers, so the kind of each is written out as a list. A rule that has no such list is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.checkpoints.decoder import LAYER_COUNT_KEYS, text_config
from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.layout import depth_of, modules_of
from evomerge.merge.plan import MergePlan, ModulePlan

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
    r"_(period|interval|offset|step|pattern)$|_every_n_|^first_k_|_layers$|(attention|block)_types?$"
    r"|(layers?|block|visual)_(idx|ids|indices|indexes)$"
)

_TOWER_COUNT_KEYS = (*LAYER_COUNT_KEYS, "depth", "encoder_layers")
# An encoder and its decoder share one config.
_COUNT_KEYS = {
    "encoder": (*LAYER_COUNT_KEYS, "encoder_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}


def merged_config(plan: MergePlan, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The donor's config with what every layer is, their number and the weight type of the merged model.

    Raises:
        CheckpointError: The layers change, but the config says their number or what they are in no known way.
    """
    donor = checkpoints[plan.donor]
    merged = {key: copy.deepcopy(value) for key, value in donor.config.items() if key != "_name_or_path"}
    depths = {name: depth_of(layout) for name, layout in modules_of(donor).items()}
    for module in plan.modules:
        depth = depths[module.name] if module.name in depths else depths[DEFAULT]
        is_text = module.name in (DEFAULT, TEXT_DECODER)
        section = _text_section(merged) if is_text else _section(merged, module.name)
        parts = [merged, section] if is_text else [section]
        keys = _count_keys(module.name, has_section=section is not merged)
        _count_layers(parts, keys, plan.donor, module, depth)
        moved = module.layers != tuple((plan.donor, layer) for layer in range(depth))
        configs = {model: checkpoints[model].config for model in _models(plan.donor, module)}
        if is_text:
            texts = {model: text_config(config) for model, config in configs.items()}
            _list_layers(section, plan.donor, module, texts, moved=moved)
        elif moved:
            sections = {model: _section(config, module.name) for model, config in configs.items()}
            _refuse_rules(section, plan.donor, module, sections)
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.dtype is not None}
    if len(dtypes) == 1:
        merged["dtype"] = merged["torch_dtype"] = dtype = dtypes.pop()
        for part in merged.values():
            if isinstance(part, dict):
                part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    return merged


def _models(donor: str, module: ModulePlan) -> list[str]:
    return sorted({model for model, _ in module.layers} | {donor})


def _text_section(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model, to be changed."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _section(config: Any, module: str) -> Any:
    """The part of a config that describes another module, as `vision_config` a `vision_tower`."""
    nested = config.get(f"{module.split('_')[0]}_config")
    return nested if isinstance(nested, dict) else config


def _count_keys(module: str, *, has_section: bool) -> tuple[str, ...]:
    """Where the section of a module may state its number of layers."""
    if module in (DEFAULT, TEXT_DECODER):
        return LAYER_COUNT_KEYS
    return _COUNT_KEYS.get(module, _TOWER_COUNT_KEYS if has_section else ())


def _count_layers(
    parts: Sequence[dict[str, Any]], keys: Sequence[str], donor: str, module: ModulePlan, depth: int
) -> None:
    """Write the number of layers wherever the config states it."""
    counts = [(part, key) for part in parts for key in keys if part.get(key) == depth]
    if not counts and len(module.layers) != depth:
        of = "" if module.name == DEFAULT else f" of {module.name}"
        known = ", ".join(keys) or "a section of its own"
        reason = f"states the number of layers{of} in none of {known}, so it cannot change"
        raise CheckpointError(Fault(path=f"{donor}: config.json", reason=reason))
    for part, key in counts:
        part[key] = len(module.layers)


def _list_layers(
    text: dict[str, Any],
    donor: str,
    module: ModulePlan,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    moved: bool,
) -> None:
    """Write out what each layer is.

    Args:
        text: The part of the merged config that describes the layers; changed in place.
        donor: The model that it stems from.
        module: The layers.
        configs: Model -> its config, flat.
        moved: Whether any layer is not the donor's own at its old place.
    """
    if moved:
        configs = {
            model: _lists_of_transformers(config) | {k: v for k, v in config.items() if v is not None}
            for model, config in configs.items()
        }
    for key in PER_LAYER_KEYS:
        if configs[donor].get(key) is not None:
            text[key] = [_per_layer(configs[model], model, key, layer) for model, layer in module.layers]
    if not moved:
        return
    for key, rules in _RULES_OF_LISTS.items():
        if isinstance(text.get(key), list):
            for rule in rules:
                text.pop(rule, None)
    if any(key in config for config in configs.values() for key in SPARSE_KEYS):
        dense = [is_dense(configs[model], layer) for model, layer in module.layers]
        text["mlp_only_layers"] = [position for position, found in enumerate(dense) if found]
        text["decoder_sparse_step"] = 1
    _refuse_rules(text, donor, module, configs)


def _refuse_rules(
    section: Mapping[str, Any], donor: str, module: ModulePlan, configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse a merged config in which some setting would speak of other layers than in the sources."""
    moved = any(layer != position for position, (_, layer) in enumerate(module.layers))
    settled = {*_TOWER_COUNT_KEYS, *(key for keys in _COUNT_KEYS.values() for key in keys)}
    settled |= {*PER_LAYER_KEYS, *SPARSE_KEYS}
    if not section.get("use_sliding_window") or isinstance(section.get("layer_types"), list):
        settled.add("max_window_layers")
    for key in sorted(section.keys() - settled):
        value = section[key]
        trivial = value in (None, 0, []) or (value == 1 and key.endswith(("interval", "step", "period")))
        if _RULE.search(key) and not (
            trivial if moved else all(c.get(key) == value for c in configs.values())
        ):
            reason = (
                f"{key}: {value!r} says what layers are by their number, but the merge moves layers; this is "
                f"supported for {', '.join(PER_LAYER_KEYS + SPARSE_KEYS)} only"
            )
            raise CheckpointError(Fault(path=f"{donor}: config.json", reason=reason))


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
