"""Token ids in configs, kept right when a merged model numbers its tokens anew.

`config.json` and `generation_config.json` name the tokens that begin, end and pad a text by their ids. mergekit
leaves these as they are in the base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.merge.vocabulary_rows import VOCABULARY_SIZE

_TOKEN_IDS = re.compile(r"(^|_)token_(id|ids|index)$|^(begin_)?suppress_tokens$")


@dataclass(frozen=True, kw_only=True)
class IdChanges:
    """What becomes of the token ids in a config.

    Attributes:
        num_rows: The vocabulary size of the merged model.
        moved: Id in the model that gives the config -> id in the merged model, for every token of both.
        fallback: Config of the model that gives the tokenizer, and its ids likewise; it is asked for what
            the merged vocabulary lacks. None if it is the same model.
    """

    num_rows: int
    moved: Mapping[int, int]
    fallback: tuple[Mapping[str, Any], Mapping[int, int]] | None

    def apply(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Change a config or a generation config.

        Returns:
            The new config, and one line for every entry that had to be given up or replaced.
        """
        changed, lost = dict(config), []
        for key, value in config.items():
            if key == VOCABULARY_SIZE:
                changed[key] = self.num_rows
            elif key == "text_config" and isinstance(value, dict):
                changed[key], nested = self.apply(value)
                lost += [f"{key}.{line}" for line in nested]
            elif _TOKEN_IDS.search(key) and value is not None:
                changed[key], lines = self._ids(key, value)
                lost += lines
        return changed, lost

    def _ids(self, key: str, value: Any) -> tuple[Any, list[str]]:
        numbers = value if isinstance(value, list) else [value]
        # Some configs write -1 for "none".
        if not all(type(number) is int and number >= 0 for number in numbers):
            return value, []
        gone = [number for number in numbers if number not in self.moved]
        if not gone:
            return _like(value, [self.moved[number] for number in numbers]), []
        known = [self.moved[number] for number in numbers if number in self.moved]
        replaced = _like(value, known) if known else self._of_fallback(key)
        missing = ", ".join(map(str, gone))
        return replaced, [f"{key}: the merged vocabulary lacks token {missing}; it is now {replaced}"]

    def _of_fallback(self, key: str) -> Any:
        if self.fallback is None:
            return None
        config, moved = self.fallback
        value = config.get(key)
        numbers: list[Any] = value if isinstance(value, list) else [value]
        known = [moved[number] for number in numbers if number in moved]
        return _like(value, known) if known else None


def _like(value: Any, numbers: list[int]) -> Any:
    return numbers if isinstance(value, list) else numbers[0]
