"""Which tensors of a model an adapter changes, found from names and shapes alone.

A key of an adapter names a module as it was called in training, such as

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

while a checkpoint may have been saved without the leading `model.`, or with more before it. One change of
the beginning must therefore bring all keys to names that the checkpoint has; nothing may be left over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.checkpoints.adapter import FLOATS, Adapter, Update
from evomerge.checkpoints.adapter_vocabulary import check_rows, check_shared, unstored_heads
from evomerge.checkpoints.architecture import TensorRole
from evomerge.checkpoints.modules import find_modules, shared_template
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, nearest

_PREFIX = "base_model.model."
# Ending of a key -> (what it is, the parameter of the module that it changes).
_ENDINGS = {
    ".lora_A.weight": ("A", "weight"),
    ".lora_B.weight": ("B", "weight"),
    ".lora_B.bias": ("offset", "bias"),
    ".lora_embedding_A": ("embedding A", "weight"),
    ".lora_embedding_B": ("embedding B", "weight"),
}
# Models whose layers are transformers' Conv1D, which stores [in, out].
_TRANSPOSED = ("gpt2", "openai-gpt")


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What an adapter has for one tensor.

    Attributes:
        module: The module as it was called in training.
        keys: What it is -> key in the adapter's file.
    """

    module: str
    keys: dict[str, str] = field(default_factory=dict)


def plan_updates(adapter: Adapter, model: Checkpoint) -> dict[str, Update]:
    """Find out what an adapter changes in a model.

    Returns:
        Name of a tensor in the model -> how it changes, sorted by name.

    Raises:
        CheckpointError: The adapter does not fit the model; the message names the adapter's tensor.
    """
    try:
        modules = find_modules(model.tensors)
    except ValueError as error:
        raise CheckpointError(f"{model.folder}: {error}") from None
    if adapter.settings.fan_in_fan_out and model.config.get("model_type") not in _TRANSPOSED:
        raise CheckpointError(
            f"{adapter.config_file}: fan_in_fan_out: expected false, as {model.folder} has model_type "
            f"{model.config.get('model_type')!r}, found true; it is for {' and '.join(_TRANSPOSED)}"
        )
    roles = {name: role for inside in modules.values() for name, role in inside.items()}
    targets = _targets(adapter)
    keys = {tensor: target.keys for tensor, target in targets.items()}
    unstored = unstored_heads(targets, model, roles)
    stored = [tensor for tensor in targets if tensor not in unstored]
    names = _names_in_modules(stored, modules) or _names(stored, adapter, model)
    check_shared({tensor: names.get(tensor) for tensor in sorted(targets)}, keys, adapter, model, roles)
    updates = {name: _update(targets[t], adapter, model, roles[name]) for t, name in names.items()}
    check_rows(updates, adapter, model, roles)
    return dict(sorted(updates.items()))


def _targets(adapter: Adapter) -> dict[str, _Target]:
    """Tensor as it was called in training -> what the adapter has for it."""
    targets: dict[str, _Target] = {}
    for key in adapter.weights.tensors:
        name = key.removeprefix(_PREFIX)
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is not None:
            module = name.removesuffix(ending)
            kind, parameter = _ENDINGS[ending]
            tensor = f"{module}.{parameter}"
        elif "lora_" in name:
            raise CheckpointError(
                f"{adapter.file}: tensor '{key}': expected lora_A, lora_B, lora_embedding_A or "
                "lora_embedding_B; merge this kind of adapter with peft's merge_and_unload instead"
            )
        else:
            kind, tensor = "replacement", name.replace(".base_layer.", ".")
            module = tensor.rpartition(".")[0]
        keys = targets.setdefault(tensor, _Target(module=module)).keys
        if kind in keys:
            raise CheckpointError(f"{adapter.file}: '{keys[kind]}' and '{key}' both give {kind} of {tensor}")
        keys[kind] = key
    return targets


def _names(targets: Sequence[str], adapter: Adapter, model: Checkpoint) -> dict[str, str]:
    """Tensor as it was called in training -> its name in the model's checkpoint."""
    known = model.tensors
    missing = [tensor for tensor in sorted(targets) if tensor not in known]
    if not missing:
        return {tensor: tensor for tensor in targets}
    # (what to remove from the beginning, what to put there)
    probe = missing[0]
    pieces = probe.split(".")
    changes = [("", name.removesuffix(probe)) for name in known if name.endswith(f".{probe}")]
    changes += [
        (".".join(pieces[:count]) + ".", "")
        for count in range(1, len(pieces) - 1)
        if ".".join(pieces[count:]) in known
    ]
    fitting, unknown = [], probe
    for old, new in changes:
        names = {tensor: _renamed(tensor, old, new, known) for tensor in targets}
        lost = [tensor for tensor in sorted(targets) if names[tensor] not in known]
        if not lost:
            fitting.append(names)
        else:
            unknown = lost[0]
    if len(fitting) == 1 and len(set(fitting[0].values())) == len(fitting[0]):
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"{adapter.file}: '{probe}' could be any of {', '.join(names[probe] for names in fitting)} in "
            f"{model.folder}; rename the adapter's tensors as the model's"
        )
    raise CheckpointError(
        f"{adapter.file}: the adapter changes '{unknown}', which {model.folder} does not have"
        f"{nearest(unknown, known)}; check that the adapter was trained on this model"
    )


def _names_in_modules(
    targets: Sequence[str], modules: Mapping[str, Mapping[str, TensorRole]]
) -> dict[str, str]:
    """As `_names`, for a model of several modules, whose tensors transformers wraps in other ways on the disk.

    Empty for a model of one module, and where a tensor is not found.
    """
    if len(modules) == 1:
        return {}
    known = {shared_template(module, name): name for module, inside in modules.items() for name in inside}
    found = {}
    for tensor in targets:
        keys = {shared_template(module, tensor) for module in modules} & known.keys()
        if len(keys) == 1:
            found[tensor] = known[keys.pop()]
    return found if len(set(found.values())) == len(targets) else {}


def _renamed(tensor: str, old: str, new: str, known: Iterable[str]) -> str:
    changed = new + tensor.removeprefix(old) if tensor.startswith(old) else tensor
    # A head stands outside the part of the model whose beginning differs.
    return tensor if changed not in known and tensor in known else changed


def _update(target: _Target, adapter: Adapter, model: Checkpoint, role: TensorRole) -> Update:
    """Check that the adapter's tensors have the shapes that the formula needs."""
    keys, stored = target.keys, model.tensors[role.name]
    if stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{model.folder}: tensor '{role.name}': expected one of {', '.join(FLOATS)} to merge an adapter "
            f"into, found {stored.dtype}; use a model that is not quantised"
        )
    shape = stored.shape
    if "replacement" in keys:
        shape = _shape(adapter, keys["replacement"])
        if shape != stored.shape and not _is_resized(role, shape, stored.shape):
            raise _misfit(adapter, keys["replacement"], stored.shape, f"as '{role.name}' of {model.folder}")
    if "offset" in keys and _shape(adapter, keys["offset"]) != shape:
        raise _misfit(adapter, keys["offset"], shape, f"as '{role.name}' of {model.folder}")
    kinds = ("embedding A", "embedding B") if "embedding A" in keys or "embedding B" in keys else ("A", "B")
    transposed = kinds[0] != "A" or (role.layer is not None and model.config.get("model_type") in _TRANSPOSED)
    if any(kind in keys for kind in kinds):
        _check_factors(target, kinds, adapter, shape[::-1] if transposed else shape, role.name)
    return Update(
        name=role.name,
        replacement=keys.get("replacement"),
        factors=(keys[kinds[0]], keys[kinds[1]]) if kinds[0] in keys else None,
        offset=keys.get("offset"),
        scale=adapter.settings.scale_of(target.module),
        transposed=transposed,
    )


def _check_factors(
    target: _Target, kinds: tuple[str, str], adapter: Adapter, shape: tuple[int, ...], name: str
) -> None:
    for kind, other in (kinds, kinds[::-1]):
        if kind not in target.keys:
            raise CheckpointError(
                f"{adapter.file}: tensor '{target.keys[other]}': expected its other factor, the {kind} of "
                f"{target.module}, found none; save the adapter again"
            )
    if len(shape) != 2:
        raise CheckpointError(
            f"{adapter.file}: tensor '{target.keys[kinds[0]]}': expected a LoRA of a matrix, but '{name}' has "
            f"shape {list(shape)}; merge the adapter with peft's merge_and_unload instead"
        )
    rank = adapter.settings.rank_of(target.module)
    expected = ((rank, shape[1]), (shape[0], rank))
    for kind, wanted in zip(kinds, expected, strict=True):
        if _shape(adapter, target.keys[kind]) != wanted:
            why = f"for rank {rank} by {adapter.config_file.name} and '{name}' of shape {list(shape)}"
            raise _misfit(adapter, target.keys[kind], wanted, why)


def _is_resized(role: TensorRole, shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    return role.layer is None and len(shape) > 0 and shape[1:] == stored[1:]


def _shape(adapter: Adapter, key: str) -> tuple[int, ...]:
    return adapter.weights.tensors[key].shape


def _misfit(adapter: Adapter, key: str, expected: tuple[int, ...], why: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.file}: tensor '{key}': expected shape {list(expected)}, {why}, found "
        f"{list(_shape(adapter, key))}; check that the adapter was trained on this model"
    )
