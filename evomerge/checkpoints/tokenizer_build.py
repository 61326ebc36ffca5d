"""Building a merged model's tokenizer: that of one model, with tokens of others added.

What is edited is the content of `tokenizer.json`, so that every version of transformers reads the result
alike; the `tokenizers` library checks it. transformers is used only for models without that file. Which
tokens a merge needs is left to `merge/vocabulary.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.chat_template import LEGACY_TEMPLATE_FILE, TEMPLATE_FILE
from evomerge.checkpoints.reader import read_json
from evomerge.checkpoints.tokenizer import tokenizer_files, vocabulary_in
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError

TOKENIZER, SETTINGS, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of `tokenizer_config.json` that name a special token, in the order in which missing ones are added."""
LISTED = ("additional_special_tokens", "extra_special_tokens")
COMPLETE = (TOKENIZER, SETTINGS, SPECIAL_TOKENS, TEMPLATE_FILE, LEGACY_TEMPLATE_FILE)
"""Files that may lie beside an edited `tokenizer.json`; others state the vocabulary as it was before."""

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
SPECIAL = {**PLAIN, "normalized": False, "special": True}
"""How an added token is matched in texts, in the terms of `tokenizer.json`."""


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """What a model's tokenizer files say, without the tokens that the model has no embedding for.

    Attributes:
        folder: The model's folder.
        content: The content of `tokenizer.json`.
        ids: Token -> id, by ascending id.
        added: Added token -> how it is matched, by ascending id.
        beyond: Tokens whose ids lie behind the last row of the embedding.
    """

    folder: Path
    content: Mapping[str, Any]
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]
    beyond: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OutputTokenizer:
    """The tokenizer of a merged model.

    Attributes:
        folder: The model whose tokenizer it is or extends.
        content: The content of its `tokenizer.json`, or None if the files of `folder` serve as they are.
        ids: Token -> id; empty if nothing asked for them.
        chat_template: The template that replaces that of `folder`, or None.
    """

    folder: Path
    content: Mapping[str, Any] | None
    ids: Mapping[str, int]
    chat_template: str | None

    def write(self, writer: CheckpointWriter) -> None:
        """Write its files.

        Raises:
            CheckpointError: A file of the model's tokenizer is damaged or leads out of its folder.
        """
        for file in tokenizer_files(self.folder):
            if file.name in (TEMPLATE_FILE, LEGACY_TEMPLATE_FILE) and self.chat_template is not None:
                continue
            if file.name == SETTINGS:
                old = read_json(self.folder, SETTINGS)
                new = self._settings(old)
                if new != old:
                    writer.add_json(SETTINGS, new)
                    continue
            elif self.content is not None and file.name == SPECIAL_TOKENS:
                writer.add_json(SPECIAL_TOKENS, _without_unknown(read_json(self.folder, file.name), self.ids))
                continue
            elif self.content is not None and (file.name == TOKENIZER or file.name not in COMPLETE):
                continue
            writer.copy(file)
        if self.content is not None:
            writer.add_json(TOKENIZER, self.content)
        if self.chat_template is not None:
            writer.add_text(TEMPLATE_FILE, self.chat_template)

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`tokenizer_config.json` of the merged model, given that of the model it starts from."""
        changed = dict(settings)
        if self.chat_template is not None and "chat_template" in changed:
            changed["chat_template"] = self.chat_template
        if self.content is None:
            return changed
        # The name that transformers 5 gives a tokenizer without a class of its own; transformers 4 has none.
        if changed.get("tokenizer_class") == "TokenizersBackend":
            changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        changed.pop("auto_map", None)
        if "added_tokens_decoder" in changed:
            changed["added_tokens_decoder"] = {
                str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
                for entry in self.content["added_tokens"]
            }
        return _without_unknown(changed, self.ids)


def read_tokenizer(folder: Path, num_rows: int) -> ModelTokenizer | None:
    """Read the tokenizer of a model.

    Args:
        folder: The model's folder.
        num_rows: Rows of the model's embedding; tokens behind them are left out.

    Returns:
        The tokenizer, or None if the folder has none.

    Raises:
        CheckpointError: The tokenizer is damaged, of an unknown form, or has no fast version.
    """
    if not [file for file in tokenizer_files(folder) if file.name not in COMPLETE[1:]]:
        return None
    content = read_json(folder, TOKENIZER) if (folder / TOKENIZER).exists() else _converted(folder)
    ids = vocabulary_in(content)
    if ids is None:
        raise CheckpointError(f"{folder}: {TOKENIZER} states no vocabulary in a known form")
    added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    settings = read_json(folder, SETTINGS) if (folder / SETTINGS).exists() else {}
    # transformers adds these when it loads the tokenizer.
    for entry in _only_in_settings(settings):
        if entry["content"] not in ids:
            ids[entry["content"]] = entry.setdefault("id", max(ids.values(), default=-1) + 1)
            added[entry["content"]] = entry
    ids = dict(sorted(ids.items(), key=lambda item: item[1]))
    beyond = tuple(token for token, number in ids.items() if number >= num_rows)
    content = {**content, "added_tokens": sorted(added.values(), key=lambda entry: int(entry["id"]))}
    return ModelTokenizer(
        folder=folder,
        content=_without(content, set(beyond)) if beyond else content,
        ids={token: number for token, number in ids.items() if number < num_rows},
        added={
            entry["content"]: {key: bool(entry.get(key, default)) for key, default in PLAIN.items()}
            for entry in content["added_tokens"]
            if entry["id"] < num_rows
        },
        beyond=beyond,
    )


def extend(
    start: ModelTokenizer, additions: Mapping[str, Mapping[str, bool]], *, chat_template: str | None
) -> OutputTokenizer:
    """Add tokens to a tokenizer.

    Args:
        start: The tokenizer; its tokens keep their ids.
        additions: Token -> how it is matched, in the order of the new ids. A token that the tokenizer has,
            but not as an added one, keeps its id and is matched so from now on.
        chat_template: The template of the result, or None for that of `start`.

    Raises:
        CheckpointError: The ids of `start` have gaps, or the library does not take the result.
    """
    if not additions and not start.beyond:
        return OutputTokenizer(folder=start.folder, content=None, ids=start.ids, chat_template=chat_template)
    ids, entries = dict(start.ids), list(start.content["added_tokens"])
    for token, matched in additions.items():
        number = ids.setdefault(token, max(ids.values(), default=-1) + 1)
        entries.append({"id": number, "content": token, **matched})
    content = {**start.content, "added_tokens": sorted(entries, key=lambda entry: int(entry["id"]))}
    _check(start.folder, content, ids)
    return OutputTokenizer(folder=start.folder, content=content, ids=ids, chat_template=chat_template)


def _check(folder: Path, content: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder}: no tokenizer can be built from its {TOKENIZER}: {error}") from error
    if found != ids:
        wrong = sorted(token for token in found.keys() | ids.keys() if found.get(token) != ids.get(token))
        raise CheckpointError(
            f"{folder}: tokens cannot be added to its tokenizer, whose ids are not 0, 1, 2, ... without a "
            f"gap: {wrong[0]!r} would become {found.get(wrong[0])}, not {ids.get(wrong[0])}; choose the "
            "tokenizer of another model as tokenizer_source"
        )


def _converted(folder: Path) -> dict[str, Any]:
    """The `tokenizer.json` that transformers makes of older files."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the files of strangers lead to
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder}: {type(tokenizer).__name__} has no fast version, and only those can be merged; save "
            f"the tokenizer with a {TOKENIZER} in a copy of the model"
        )
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content


def _only_in_settings(settings: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Every token that `tokenizer_config.json` names, as an entry of `added_tokens`, those with ids first."""
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict) and all(number.isdecimal() for number in listed):
        for number in sorted(listed, key=int):
            if (text := _text(listed[number])) is not None:
                matched = {key: bool(listed[number].get(key, default)) for key, default in PLAIN.items()}
                yield {"id": int(number), "content": text, **matched}
    named = [settings.get(key) for key in NAMED]
    for key in LISTED:
        value = settings.get(key)
        named += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    for value in named:
        if (text := _text(value)) is not None:
            yield {"content": text, **SPECIAL}


def _text(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _without(content: Mapping[str, Any], tokens: set[str]) -> dict[str, Any]:
    """The content of a `tokenizer.json` without some tokens, which are the last ones of its vocabulary."""
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in tokens}
    else:
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] not in tokens]
    if isinstance(model.get("merges"), list):
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right] for left, right in pairs if not tokens & {left, right, left + right[prefix:]}
        ]
    added = [entry for entry in content["added_tokens"] if entry["content"] not in tokens]
    return {**content, "model": model, "added_tokens": added}


def _without_unknown(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Special tokens that the vocabulary lacks would be added to it on loading."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key in NAMED and _text(value) is not None and _text(value) not in ids:
            continue
        if key in LISTED and isinstance(value, list):
            value = [token for token in value if _text(token) in ids]
        elif key in LISTED and isinstance(value, dict):
            value = {name: token for name, token in value.items() if _text(token) in ids}
        kept[key] = value
    return kept
