"""Leaves out work of lm-eval's model wrapper that its scores do not depend on.

What stays is bit for bit the same; `tests/fitness/test_fast_model.py` holds it against lm-eval's own:

- prompts are the same for every candidate, so their token ids are remembered;
- of the logits of a whole prompt, only those of the answer are turned into log-probabilities. Each position has
  a softmax of its own, and lm-eval throws the others away afterwards;
- a sequence is over when one of its stop texts appears. lm-eval goes on until the same text ended all sequences
  of a batch, so a batch in which some end with a newline and others with the end token runs to the token limit.
  Its text is cut at the first stop text, so what comes behind does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = {"attention_mask", "do_sample", "temperature"}
"""What lm-eval gives to `generate` when a task asks for nothing but greedy answers."""


class FastModel:
    """To be put before lm-eval's `HFLM` among the bases of a class.

    Legend: B sequences, T positions, V words.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __init__(self, **options: Any) -> None:
        self._ids: dict[tuple[Any, ...], list[int]] = {}
        self._first: dict[tuple[int, ...], int] = {}
        super().__init__(**options)
        # Where experts work on the tokens of all sequences at once, a sequence that is over changes the shapes
        # that the others are computed in.
        self._rows_are_apart = "expert" not in self.model.config.to_json_string(use_diff=False)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Token ids of a text, remembered."""
        key = (string, *args, *sorted(kwargs.items()))
        if key not in self._ids:
            self._ids[key] = super().tok_encode(string, *args, **kwargs)  # type: ignore[misc]
        return list(self._ids[key])

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self._first = {}
        for _, context, answer in requests:
            ids = [*context, *answer][-(self.max_length + 1) :][:-1]
            key = _without_padding(ids)
            first = len(ids) - len(answer)
            self._first[key] = min(first, self._first.get(key, first))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits BTV from the first position on that any sequence of the batch needs."""
        logits: Tensor = super()._model_call(inps, *args, **kwargs)  # type: ignore[misc]
        return logits[:, min(self._first.get(_without_padding(ids), 0) for ids in inps.tolist()) :]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Token ids BT of prompts and answers."""
        eos = _as_set(self.model.generation_config.eos_token_id)
        is_plain = kwargs.get("do_sample") is False and kwargs.keys() <= PLAIN
        if self._rows_are_apart and is_plain and not self._hides(stop, eos):
            criterion = StopEach(self.tokenizer, stop, eos, start=context.shape[1], num_rows=len(context))
            found: Tensor = self.model.generate(
                input_ids=context,
                attention_mask=kwargs["attention_mask"],
                max_length=max_length,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([criterion]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
            )
            if not criterion.is_unclear:
                return found
        return super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)  # type: ignore[misc,no-any-return]

    def _hides(self, stop: Sequence[str], eos: frozenset[int]) -> bool:
        """Whether a stop text is left out when the answer is decoded, as special tokens are.

        lm-eval does not cut a text there, so what comes behind matters. A model's own end tokens are no such
        case, as nothing comes behind them.
        """
        ends = {self.tokenizer.decode([token]) for token in eos}
        special = self.tokenizer.all_special_tokens
        return any(token in text for text in stop if text not in ends for token in special)


class StopEach(StoppingCriteria):  # type: ignore[misc]
    """Ends every sequence of a batch on its own.

    Args:
        tokenizer: Its tokenizer.
        stop: Texts that end a sequence.
        eos: Tokens that end a sequence.
        start: Length of the prompts.
        num_rows: Number of sequences.

    Attributes:
        is_unclear: A stop text was seen that is not in the text as lm-eval decodes it. Generation ends at once,
            and its result is of no use.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        eos: frozenset[int],
        *,
        start: int,
        num_rows: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._eos = eos
        self._start = start
        self._over = [False] * num_rows
        # lm-eval looks at two tokens more than the text has, as it may be cut into tokens in another way.
        self._window = 2 + max(len(tokenizer.encode(text, add_special_tokens=False)) for text in stop)
        self.is_unclear = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Tell for each of the B sequences whether it is over."""
        import torch

        open_rows = [row for row, over in enumerate(self._over) if not over]
        recent = input_ids[open_rows, max(self._start, input_ids.shape[1] - self._window) :].tolist()
        for row, ids, text in zip(open_rows, recent, self._tokenizer.batch_decode(recent), strict=True):
            if ids[-1] in self._eos:
                self._over[row] = True
            elif any(end in text for end in self._stop):
                answer = self._tokenizer.decode(input_ids[row, self._start :], skip_special_tokens=True)
                self._over[row] = any(end in answer for end in self._stop)
                self.is_unclear |= not self._over[row]
        over = [True] * len(self._over) if self.is_unclear else self._over
        return torch.tensor(over, device=input_ids.device)


def _without_padding(ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids without zeros at the end, which lm-eval pads with."""
    end = len(ids)
    while end and ids[end - 1] == 0:
        end -= 1
    return tuple(ids[:end])


def _as_set(tokens: int | Sequence[int] | None) -> frozenset[int]:
    if tokens is None:
        return frozenset()
    return frozenset([tokens] if isinstance(tokens, int) else tokens)
