"""How a recipe names a model, and where that model lies on disk.

The text form is mergekit's: `path-or-id[@revision][+adapter]`. A local folder always wins over the hub.
What is in the folder is `reader`'s business.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints.reader import CONFIG, weight_files
from evomerge.checkpoints.tokenizer import tokenizer_files
from evomerge.errors import CheckpointError, nearest

_FORM = "path-or-id[@revision][+adapter]"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Patterns of the hub match across '/', so folders (other formats, other precisions) are excluded.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_UNWANTED = ("*/*", "consolidated*")


@functools.total_ordering
@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it; ordered by its text.

    Attributes:
        model: A folder, or a hub id such as `owner/name`.
        revision: Branch, tag or commit on the hub, or None for its default.
        adapter: A LoRA adapter on top of the model, or None.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "revision", "adapter"):
            text = getattr(self, name)
            if text is None:
                continue
            if not text or text != text.strip() or not text.isprintable():
                raise ValueError(f"the {name} of a model must be text without outer spaces, found {text!r}")
            if "@" in text or "+" in text:
                raise ValueError(f"the {name} of a model cannot hold '@' or '+', found {text!r}")

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read `path-or-id[@revision][+adapter]`.

        Raises:
            ValueError: The text is not of that form.
        """
        for sign in "@+":
            if text.count(sign) > 1:
                raise ValueError(f"expected {_FORM} with at most one '{sign}', found {text!r}")
        rest, plus, adapter = text.partition("+")
        model, at, revision = rest.partition("@")
        try:
            return cls(model, revision if at else None, adapter if plus else None)
        except ValueError as error:
            raise ValueError(f"expected {_FORM}, found {text!r}: {error}") from None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        adapter = f"+{self.adapter}" if self.adapter is not None else ""
        return f"{self.model}{revision}{adapter}"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, ModelReference):
            return NotImplemented
        return str(self) < str(other)


def resolve(ref: ModelReference, roots: Sequence[Path] = ()) -> Path:
    """Return the folder of a model, downloading it from the hub if it is nowhere on this machine.

    Args:
        ref: The model.
        roots: Folders that a relative path may be relative to, tried in order before the working folder.

    Raises:
        CheckpointError: The model is neither a local folder nor to be had from the hub.
    """
    if ref.adapter is not None:
        raise CheckpointError(
            f"{ref}: adapters are not supported yet: merge the adapter into a full checkpoint first"
        )
    places = _places(ref.model, roots)
    for place in places:
        if place.is_dir():
            if ref.revision is not None:
                raise CheckpointError(
                    f"{ref}: a revision is for models of the hub, but {place} is a local folder; "
                    f"remove '@{ref.revision}'"
                )
            return place
        if place.exists():
            raise CheckpointError(f"{ref}: {place} is a file; name the folder that holds config.json")
    if ref.model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(ref.model):
        looked = ", ".join(str(place) for place in places)
        raise CheckpointError(f"{ref}: no such folder{_sibling(places)}; looked for {looked}")
    return _download(ref, places)


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


def _download(ref: ModelReference, places: Sequence[Path]) -> Path:
    import huggingface_hub

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                ref.model,
                revision=ref.revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                local_files_only=local_files_only,
            )
        )

    # The hub raises errors of a dozen unrelated classes, those of its HTTP library included.
    try:
        cached = snapshot(local_files_only=True)
    except Exception:
        cached = None
    usable = cached is not None and _has_weights(cached)
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
            f"{ref}: not a folder here (looked for {looked}){_sibling(places)}, not in the hub cache, "
            f"and the download failed: {reason}; check the path, or log in with `hf auth login`"
        ) from error


def _has_weights(folder: Path) -> bool:
    """Whether a cached snapshot can be opened; loading only a config or a tokenizer leaves a partial one."""
    try:
        return bool(weight_files(folder)) and (folder / CONFIG).is_file()
    except CheckpointError:
        return False
