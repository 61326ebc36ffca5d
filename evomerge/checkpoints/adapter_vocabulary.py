"""What an adapter may do to the tensors with one row per token: the embedding, and the head.

Adapters that add tokens bring a longer embedding and head along, and a tokenizer. In many models the head
is the embedding itself; a change of one of the two alone would need a model with two tensors, which could
not be merged with its siblings, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from evomerge.checkpoints.adapter import Adapter, Update
from evomerge.checkpoints.architecture import TensorRole, classify
from evomerge.checkpoints.decoder import text_config
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.tokenizer import vocabulary
from evomerge.errors import CheckpointError

# Embeddings too, of which a model may happen to have as many as tokens.
_POSITIONS = re.compile(r"(^|\.)wpe\.|position")
_UNTIE = (
    "the merged model would need a head of its own: load the model with tie_word_embeddings=False, copy the "
    "embedding to lm_head.weight, save it and use that one"
)


def unstored_heads(
    targets: Collection[str], model: Checkpoint, roles: Mapping[str, TensorRole]
) -> frozenset[str]:
    """The heads among an adapter's targets that the model does not store, having the embedding instead."""
    if _says_tied(model) is False or any(_is_head(role) for role in roles.values()):
        return frozenset()
    return frozenset(target for target in targets if _names_a_head(target))


def check_shared(
    names: Mapping[str, str | None],
    keys: Mapping[str, Mapping[str, str]],
    adapter: Adapter,
    model: Checkpoint,
    roles: Mapping[str, TensorRole],
) -> None:
    """Where embedding and head are one tensor, an adapter may only give both the same new values.

    Args:
        names: Target -> its name in the model, or None for an unstored head.
        keys: Target -> what the adapter has for it -> key in the adapter's file.
        adapter: The adapter.
        model: The model.
        roles: Roles of the model's tensors.

    Raises:
        CheckpointError: The adapter does something else.
    """
    rows = _vocabulary_tensors(model, roles)
    changed = [target for target, name in names.items() if name is None or name in rows]
    if not changed or not _is_tied(model, roles):
        return
    for target in changed:
        if set(keys[target]) != {"replacement"}:
            raise CheckpointError(
                f"{adapter.file}: tensor '{min(keys[target].values())}': expected no LoRA of the embedding or "
                f"the head, which are one tensor in {model.folder} (tie_word_embeddings); {_UNTIE}"
            )
    replacements = [keys[target]["replacement"] for target in changed]
    alone = len(changed) == 1 and not (adapter.settings.tied and names[changed[0]] is not None)
    first, *others = (adapter.weights.tensor(key) for key in replacements)
    if alone or not all(first.equal(other) for other in others):
        found = f"only '{replacements[0]}'" if alone else f"other values in '{replacements[1]}'"
        raise CheckpointError(
            f"{adapter.file}: tensor '{replacements[0]}': expected the same values for the embedding and the "
            f"head, which are one tensor in {model.folder} (tie_word_embeddings), found {found}; {_UNTIE}"
        )


def check_rows(
    updates: Mapping[str, Update], adapter: Adapter, model: Checkpoint, roles: Mapping[str, TensorRole]
) -> None:
    """Embedding and head must have one row for each token of one vocabulary.

    Raises:
        CheckpointError: They would not, or another tensor would change its shape.
    """
    vocabulary_tensors = _vocabulary_tensors(model, roles)
    shapes = {
        name: adapter.weights.tensors[update.replacement].shape
        for name, update in updates.items()
        if update.replacement is not None
    }
    for name, shape in shapes.items():
        stored = model.tensors[name].shape
        if shape == stored:
            continue
        if name not in vocabulary_tensors:
            raise CheckpointError(
                f"{adapter.file}: tensor '{updates[name].replacement}': expected shape {list(stored)}, as "
                f"'{name}' of {model.folder}, found {list(shape)}; check that the adapter was trained on this "
                "model"
            )
        for other in vocabulary_tensors:
            rows = shapes.get(other, model.tensors[other].shape)[0]
            if rows != shape[0]:
                raise CheckpointError(
                    f"{adapter.file}: tensor '{updates[name].replacement}': expected {rows} rows, as "
                    f"'{other}' will have, found {shape[0]}; save the adapter with save_embedding_layers=True, "
                    "which includes both"
                )


def own_rows(updates: Mapping[str, Update], adapter: Adapter, model: Checkpoint) -> int | None:
    """Rows of the embedding or head that the adapter brings along, or None if it brings neither."""
    for name in _vocabulary_tensors(model, classify(model.tensors)):
        if name in updates and (key := updates[name].replacement) is not None:
            return adapter.weights.tensors[key].shape[0]
    return None


def tokenizer_folder(rows: int | None, adapter: Adapter, model: Checkpoint) -> Path:
    """Where to take the tokenizer from: the adapter's if it brings its own embedding, else the model's.

    Without an embedding of its own an adapter was trained on the model's tokens, whatever its folder holds.

    Args:
        rows: What `own_rows` gave.
        adapter: The adapter.
        model: The model.

    Raises:
        CheckpointError: The tokenizer has tokens that the embedding has no row for.
    """
    if rows is None:
        return model.folder
    folder = adapter.folder if (adapter.folder / "tokenizer.json").exists() else model.folder
    tokens = vocabulary(folder)
    if tokens and max(tokens.values()) >= rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {max(tokens.values())}, but the embedding in {adapter.file} "
            f"has {rows} rows; put the tokenizer that the adapter was trained with into {adapter.folder}"
        )
    return folder


def _is_tied(model: Checkpoint, roles: Mapping[str, TensorRole]) -> bool:
    flag = _says_tied(model)
    if flag is not None:
        return flag
    # Without the flag the architecture decides; a stored head that differs from the embedding is its own.
    names = _vocabulary_tensors(model, roles)
    heads = [name for name in names if _is_head(roles[name])]
    embeddings = [name for name in names if not _is_head(roles[name])]
    return not heads or any(model.tensor(h).equal(model.tensor(e)) for h in heads for e in embeddings)


def _says_tied(model: Checkpoint) -> bool | None:
    """What the config says; of a nested one, models of several modules follow the outer part."""
    flags = (part.get("tie_word_embeddings") for part in (model.config, text_config(model.config)))
    return next((flag for flag in flags if isinstance(flag, bool)), None)


def _vocabulary_tensors(model: Checkpoint, roles: Mapping[str, TensorRole]) -> list[str]:
    """The tensors with one row per token."""
    rows = text_config(model.config).get("vocab_size")
    return [
        name
        for name, role in roles.items()
        if role.layer is None
        and role.part in ("embedding", "head")
        and not _POSITIONS.search(name)
        and model.tensors[name].shape[:1] == (rows,)
    ]


def _is_head(role: TensorRole) -> bool:
    return role.layer is None and role.part == "head"


def _names_a_head(target: str) -> bool:
    return not any(piece.isdigit() for piece in target.split(".")) and _is_head(classify([target])[target])
