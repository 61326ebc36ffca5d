"""Which tokenizer a model's folder holds, and whether two models number their tokens alike.

Only files are read, without transformers. Merging the embeddings of two vocabularies position by
position is meaningful only if a position means the same token in both.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reader import contained, read_json

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that make up a tokenizer, as an export must carry them along."""

PROCESSOR_FILES: tuple[str, ...] = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "normalizer.json",
)
"""Files that say how images, videos or sound become inputs of a model."""

_NUM_EXAMPLES = 3


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files in a model's folder, in the order of `TOKENIZER_FILES`.

    Raises:
        CheckpointError: One of them leads out of the folder.
    """
    return [contained(folder, name) for name in TOKENIZER_FILES if _has(folder, name)]


def processor_files(folder: Path) -> list[Path]:
    """Return the files in a model's folder that say how inputs other than texts are prepared.

    Raises:
        CheckpointError: One of them leads out of the folder.
    """
    return [contained(folder, name) for name in PROCESSOR_FILES if _has(folder, name)]


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token -> id, added tokens included, or None if no file states it in a known form.

    `tokenizer.json` is read first, then `vocab.json` with `added_tokens.json`.

    Raises:
        CheckpointError: One of these files is damaged or leads out of the folder.
    """
    if _has(folder, "tokenizer.json"):
        tokens = vocabulary_in(read_json(folder, "tokenizer.json"))
        if tokens is not None:
            return tokens
    if not _has(folder, "vocab.json"):
        return None
    tokens = _ids(read_json(folder, "vocab.json"))
    if tokens is None or not _has(folder, "added_tokens.json"):
        return tokens
    added = _ids(read_json(folder, "added_tokens.json"))
    return None if added is None else {**tokens, **added}


def same_vocabulary(a: Path, b: Path) -> bool | None:
    """Return whether two models give every token the same id; None if one states no vocabulary.

    Raises:
        CheckpointError: A file of the tokenizer is damaged; not when both have the same file.
    """
    if _has(a, "tokenizer.json") and _has(b, "tokenizer.json"):
        # Most models have that of their base, and reading it takes longer than merging a layer.
        one, other = contained(a, "tokenizer.json"), contained(b, "tokenizer.json")
        if filecmp.cmp(one, other, shallow=False):
            return True
    of_a, of_b = vocabulary(a), vocabulary(b)
    return None if of_a is None or of_b is None else of_a == of_b


def difference(a: Path, b: Path) -> str:
    """Return in words how the vocabularies of two models differ, with up to three examples of each kind.

    Raises:
        CheckpointError: A file of the tokenizer is damaged.
    """
    of_a, of_b = vocabulary(a), vocabulary(b)
    if of_a is None or of_b is None:
        unknown = " and ".join(str(folder) for folder, of in ((a, of_a), (b, of_b)) if of is None)
        return f"the vocabulary of {unknown} cannot be read from its files"
    moved = {token: (of_a[token], of_b[token]) for token in of_a.keys() & of_b.keys()}
    moved = {token: ids for token, ids in moved.items() if ids[0] != ids[1]}
    kinds = [
        (f"only in {a}", _examples({token: of_a[token] for token in of_a.keys() - of_b.keys()})),
        (f"only in {b}", _examples({token: of_b[token] for token in of_b.keys() - of_a.keys()})),
        ("with another id", _examples(moved)),
    ]
    parts = [f"{examples} {kind}" for kind, examples in kinds if examples]
    return "; ".join(parts) if parts else f"both number the same {len(of_a)} tokens alike"


def in_words(tokens: Iterable[str]) -> str:
    """Such as `5 tokens ('a', 'b', 'c', ...)`."""
    tokens = list(tokens)
    shown = ", ".join(map(repr, tokens[:_NUM_EXAMPLES]))
    more = ", ..." if len(tokens) > _NUM_EXAMPLES else ""
    return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'} ({shown}{more})"


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def vocabulary_in(content: Mapping[str, Any]) -> dict[str, int] | None:
    """Return token -> id by the content of a `tokenizer.json`; None if its form is not known."""
    model, added = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        # Unigram: a list of [token, score] whose positions are the ids.
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab):
            return None
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}
    tokens = _ids(vocab)
    if tokens is None or not isinstance(added, list):
        return None
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            return None
        if type(entry.get("id")) is not int:
            return None
        tokens[entry["content"]] = entry["id"]
    return tokens


def _ids(vocab: object) -> dict[str, int] | None:
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        return None
    return dict(vocab)


def _examples(tokens: dict[str, Any]) -> str:
    """Such as `2 tokens ('<|im_start|>' = 7, '<|im_end|>' = 8)`; empty without tokens."""
    if not tokens:
        return ""
    # By id, so that the same pair of models gives the same words every time.
    chosen = sorted(tokens, key=lambda token: (tokens[token], token))[:_NUM_EXAMPLES]
    shown = [f"{token!r} = {_ids_shown(tokens[token])}" for token in chosen]
    more = ", ..." if len(tokens) > len(chosen) else ""
    return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'} ({', '.join(shown)}{more})"


def _ids_shown(ids: int | tuple[int, int]) -> str:
    return str(ids) if isinstance(ids, int) else f"{ids[0]} and {ids[1]}"
