"""How a recipe names a model, and where that model lies on disk.

The text form is mergekit's: `path-or-id[@revision][+adapter[@revision]]`. A local folder always wins over the
hub. What is in the folder is `reader`'s business; a model with an adapter becomes a folder in `adapted`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints.adapted import adapted
from evomerge.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from evomerge.checkpoints.reader import CONFIG, weight_files
from evomerge.checkpoints.tokenizer import tokenizer_files
from evomerge.errors import CheckpointError, nearest

_FORM = "path-or-id[@revision][+adapter[@revision]]"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Patterns of the hub match across '/', so folders (other formats, other precisions) are excluded.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_UNWANTED = ("*/*", "consolidated*")
# Some adapters lie beside the model they were merged into, or the state of their training.
_WANTED_OF_ADAPTER = (ADAPTER_WEIGHTS, *(pattern for pattern in _WANTED if pattern != "*.safetensors"))


@functools.total_ordering
@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it; ordered by its text.

    Attributes:
        model: A folder, or a hub id such as `owner/name`.
        revision: Branch, tag or commit on the hub, or None for its default.
        adapter: A LoRA adapter on top of the model, as a folder or a hub id, or None.
        adapter_revision: Branch, tag or commit of the adapter on the hub, or None for its default.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __post_init__(self) -> None:
        if self.adapter is None and self.adapter_revision is not None:
            raise ValueError(f"expected an adapter to have revision {self.adapter_revision!r}, found none")
        for name in ("model", "revision", "adapter", "adapter_revision"):
            text = getattr(self, name)
            if text is None:
                continue
            if not text or text != text.strip() or not text.isprintable():
                raise ValueError(f"the {name} of a model must be text without outer spaces, found {text!r}")
            if "@" in text or "+" in text:
                raise ValueError(f"the {name} of a model cannot hold '@' or '+', found {text!r}")

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read `path-or-id[@revision][+adapter[@revision]]`.

        Raises:
            ValueError: The text is not of that form.
        """
        parts = text.split("+")
        if len(parts) > 2:
            raise ValueError(f"expected {_FORM} with at most one '+', found {text!r}")
        fields: list[str | None] = []
        for part in parts:
            name, at, revision = part.partition("@")
            if "@" in revision:
                raise ValueError(f"expected {_FORM} with at most one '@' each, found {text!r}")
            fields += [name, revision if at else None]
        try:
            return cls(*fields)  # type: ignore[arg-type]  # the first is never None
        except ValueError as error:
            raise ValueError(f"expected {_FORM}, found {text!r}: {error}") from None

    def __str__(self) -> str:
        text = _with_revision(self.model, self.revision)
        if self.adapter is not None:
            text += f"+{_with_revision(self.adapter, self.adapter_revision)}"
        return text

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, ModelReference):
            return NotImplemented
        return str(self) < str(other)


def resolve(ref: ModelReference, roots: Sequence[Path] = ()) -> Path:
    """Return the folder of a model, downloading it from the hub if it is nowhere on this machine.

    Of a model with an adapter it is the folder of the two merged, made on first use; see `adapted`.

    Args:
        ref: The model.
        roots: Folders that a relative path may be relative to, tried in order before the working folder.

    Raises:
        CheckpointError: The model, or its adapter, is neither a local folder nor to be had from the hub, or
            the two cannot be merged.
        EvomergeError: There is no place for the merged checkpoint.
    """
    folder = _folder(ref, ref.model, ref.revision, roots, is_adapter=False)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{ref}: {folder} is an adapter; name it behind the model it was trained on, as in model+{ref.model}"
        )
    if ref.adapter is None:
        return folder
    return adapted(folder, _folder(ref, ref.adapter, ref.adapter_revision, roots, is_adapter=True))


def absolute(ref: ModelReference, roots: Sequence[Path] = ()) -> ModelReference:
    """Return the reference with local folders by absolute paths, so that it means the same from anywhere.

    Args:
        ref: The model.
        roots: As for `resolve`.

    Raises:
        CheckpointError: The path of a folder cannot be part of a reference.
    """

    def named(text: str) -> str:
        return next((str(place) for place in _places(text, roots) if place.is_dir()), text)

    adapter = None if ref.adapter is None else named(ref.adapter)
    try:
        return ModelReference(named(ref.model), ref.revision, adapter, ref.adapter_revision)
    except ValueError as error:
        raise CheckpointError(f"{ref}: {error}; move it, or make a link to it with another name") from None


def _with_revision(text: str, revision: str | None) -> str:
    return text if revision is None else f"{text}@{revision}"


def _folder(
    ref: ModelReference, name: str, revision: str | None, roots: Sequence[Path], *, is_adapter: bool
) -> Path:
    """The folder of a reference's model, or of its adapter."""
    places = _places(name, roots)
    for place in places:
        if place.is_dir():
            if revision is not None:
                raise CheckpointError(
                    f"{ref}: a revision is for models of the hub, but {place} is a local folder; "
                    f"remove '@{revision}'"
                )
            return place
        if place.exists():
            needed = ADAPTER_CONFIG if is_adapter else CONFIG
            raise CheckpointError(f"{ref}: {place} is a file; name the folder that holds {needed}")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        looked = ", ".join(str(place) for place in places)
        raise CheckpointError(f"{ref}: no such folder{_sibling(places)}; looked for {looked}")
    return _download(ref, name, revision, places, is_adapter=is_adapter)


def _places(model: str, roots: Sequence[Path]) -> list[Path]:
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{model}: {error}") from error
    places = [path] if path.is_absolute() else [*(root / path for root in roots), Path.cwd() / path]
    return list(dict.fromkeys(places))


def _sibling(places: Sequence[Path]) -> str:
    """The hint naming the folder beside the missing one that is spelt most like it."""
    for place in places:
        try:
            siblings = [entry.name for entry in place.parent.iterdir() if entry.is_dir()]
        except OSError:
            continue
        if hint := nearest(place.name, siblings):
            return hint
    return ""


def _download(
    ref: ModelReference, name: str, revision: str | None, places: Sequence[Path], *, is_adapter: bool
) -> Path:
    import huggingface_hub

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_WANTED_OF_ADAPTER if is_adapter else _WANTED),
                ignore_patterns=list(_UNWANTED),
                local_files_only=local_files_only,
            )
        )

    # The hub raises errors of a dozen unrelated classes, those of its HTTP library included.
    try:
        cached = snapshot(local_files_only=True)
    except Exception:
        cached = None
    usable = cached is not None and (_is_adapter(cached) if is_adapter else _has_weights(cached))
    if cached is not None and usable and tokenizer_files(cached):
        return cached
    try:
        return snapshot(local_files_only=False)
    except Exception as error:
        if cached is not None and usable:
            return cached
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        looked = ", ".join(str(place) for place in places)
        raise CheckpointError(
            f"{ref}: {f'{name}: ' if is_adapter else ''}not a folder here (looked for {looked})"
            f"{_sibling(places)}, not in the hub cache, and the download failed: {reason}; check the path, or "
            "log in with `hf auth login`"
        ) from error


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def _has_weights(folder: Path) -> bool:
    """Whether a cached snapshot can be opened; loading only a config or a tokenizer leaves a partial one."""
    try:
        return bool(weight_files(folder)) and (folder / CONFIG).is_file()
    except CheckpointError:
        return False
