"""How a model reads prompts: its tokens, its chat template, and how many tokens it reads at once.

The same as in lm-eval's model wrapper, without a model: nothing but the checkpoint's config and tokenizer is
loaded. So the length of prompts is known before a search starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.experiment import EvaluationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 256
"""lm-eval's limit where a task states none."""

NEW_TOKEN_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How a task's generation_kwargs may call the limit; the first that is there counts."""

_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What a model brings to reading prompts.

    Attributes:
        tokenizer: Its tokenizer.
        own_length: Tokens that it reads at most by its config.
        max_length: Tokens that it reads at most here.
    """

    tokenizer: PreTrainedTokenizerBase
    own_length: int
    max_length: int

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as lm-eval makes them; a text that begins with the start token gets no second one."""
        if not texts:
            return []
        start = self.tokenizer.bos_token
        special = start is None or not texts[0].startswith(start)
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        return found

    def render(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Put a conversation into the chat template."""
        from jinja2.exceptions import TemplateError

        def rendered(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return rendered(history)
        except TemplateError:  # it has no place for a system prompt
            return rendered([message for message in history if message["role"] != "system"])


def open_reader(folder: Path, settings: EvaluationSettings) -> Reader:
    """Load the config and the tokenizer of a checkpoint."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    own = _own_length(getattr(config, "text_config", None) or config, tokenizer)
    return Reader(tokenizer=tokenizer, own_length=own, max_length=settings.max_length or own)


def new_tokens(options: Mapping[str, Any]) -> int:
    """Tokens that a request for a text may generate."""
    found = (options[key] for key in NEW_TOKEN_KEYS if options.get(key) is not None)
    return int(next(found, DEFAULT_NEW_TOKENS))


def per_document(requests: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    """Every document with its requests, in the order of their `idx`."""
    groups: dict[int, list[Any]] = {}
    for request in requests:
        groups.setdefault(request.doc_id, []).append(request)
    return [(group[0].doc, sorted(group, key=lambda request: int(request.idx))) for group in groups.values()]


def _own_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    for key in _LENGTH_KEYS:
        if getattr(config, key, None) is not None:
            return int(getattr(config, key))
    # transformers' sign for a tokenizer that knows no limit is about 1e30.
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1e29 else _DEFAULT_LENGTH
