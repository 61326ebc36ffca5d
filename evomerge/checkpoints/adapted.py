"""A model with an adapter merged into it, kept as an ordinary checkpoint.

The checkpoint lies in `adapters/<key>/` of `$EVOMERGE_CACHE`, else of `~/.cache/evomerge`. The key is a hash
of everything that goes into it, so it is made once, and made anew when the model or the adapter changes.
Everyone else opens it like any checkpoint; processes share its memory map. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.adapter import Adapter, Update, updated_tensor
from evomerge.checkpoints.adapter_plan import plan_updates
from evomerge.checkpoints.adapter_vocabulary import own_rows, tokenizer_folder
from evomerge.checkpoints.hashes import cache_folder, cached_sha256
from evomerge.checkpoints.manifest import MANIFEST
from evomerge.checkpoints.reader import CONFIG, DTYPES, Checkpoint, contained, read_json
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.tokenizer import processor_files, tokenizer_files
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, EvomergeError

_GENERATION_CONFIG = "generation_config.json"
# Part of the key: to be counted up when the same files would give other tensors.
_FORMAT = "1"


def adapted(model_folder: Path, adapter_folder: Path) -> Path:
    """Return the folder of the model with the adapter merged into it, which is made if there is none yet.

    Of several processes that ask at once, one makes it and the others wait.

    Raises:
        CheckpointError: Model or adapter cannot be used, or they do not fit.
        EvomergeError: The disk is too small, or the cache cannot be written.
    """
    model, adapter = Checkpoint.open(model_folder), Adapter.open(adapter_folder)
    key = _key(model, adapter)
    folder = _cache() / key
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent / f".{key}.lock"):
            if not _is_complete(folder):
                # Someone deleted a part of it.
                shutil.rmtree(folder, ignore_errors=True)
                _write(model, adapter, folder, key)
    except OSError as error:
        raise EvomergeError(
            f"{folder}: the merged checkpoint of {adapter_folder} cannot be written: "
            f"{error.strerror or error}; set EVOMERGE_CACHE to a folder that can"
        ) from error
    return folder


def _write(model: Checkpoint, adapter: Adapter, folder: Path, key: str) -> None:
    updates = plan_updates(adapter, model)
    rows = own_rows(updates, adapter, model)
    tokenizer = tokenizer_folder(rows, adapter, model)
    specs = [_spec(name, updates.get(name), adapter, model) for name in model.tensors]
    with CheckpointWriter(folder) as writer:
        with writer.stream(specs) as stream:
            for name in (spec.name for spec in stream.tensors):
                changed = name in updates
                stream.write(updated_tensor(updates[name], adapter, model) if changed else model.tensor(name))
                model.release(name)
        if rows is None:
            writer.copy(contained(model.folder, CONFIG))
        else:
            writer.add_json(CONFIG, _with_rows(model.config, rows))
        for file in [*_others(model), *tokenizer_files(tokenizer)]:
            writer.copy(file)
        if _key(model, adapter) != key:
            raise CheckpointError(
                f"{model.folder} or {adapter.folder} changed while they were merged; try again when nothing "
                "writes to them"
            )
        writer.commit()


def _with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config with another vocabulary size, in the part that describes the language model."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and "vocab_size" in nested:
        return {**config, "text_config": {**nested, "vocab_size": rows}}
    return {**config, "vocab_size": rows}


def _spec(name: str, update: Update | None, adapter: Adapter, model: Checkpoint) -> TensorSpec:
    """What will be written: the type never changes, the shape only with the vocabulary."""
    stored = model.tensors[name]
    own = (
        None if update is None or update.replacement is None else adapter.weights.tensors[update.replacement]
    )
    shape = stored.shape if own is None else own.shape
    return TensorSpec(name=name, dtype=DTYPES[stored.dtype].torch_name, shape=shape)


def _key(model: Checkpoint, adapter: Adapter) -> str:
    """Hash of the files that the checkpoint is made from, wherever they lie."""
    digest = hashlib.sha256(f"{_FORMAT}\n{model.content_hash()}\n".encode())
    files = [
        *_others(model),
        *tokenizer_files(model.folder),
        adapter.config_file,
        adapter.file,
        *tokenizer_files(adapter.folder),
    ]
    for path in files:
        try:
            digest.update(f"{path.name}\0{cached_sha256(path)}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:32]


def _others(model: Checkpoint) -> list[Path]:
    """Files beside weights, config and tokenizer that the merged checkpoint keeps."""
    exists = (model.folder / _GENERATION_CONFIG).exists()
    generation = [contained(model.folder, _GENERATION_CONFIG)] if exists else []
    return [*generation, *processor_files(model.folder)]


def _cache() -> Path:
    try:
        return cache_folder().absolute() / "adapters"
    except RuntimeError as error:
        raise EvomergeError(f"EVOMERGE_CACHE: expected a folder, as there is no home: {error}") from error


def _is_complete(folder: Path) -> bool:
    """Whether the checkpoint is there with all its files; their content was checked when it was made."""
    try:
        files = read_json(folder, MANIFEST)["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process, or thread, makes the same checkpoint.

    Where the file system has no locks, the writer refuses to work beside a living one.
    """
    with lock.open("w") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
