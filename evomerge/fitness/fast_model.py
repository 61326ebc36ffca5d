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

from collections.abc import Mapping, Sequence
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
        self.rows_are_apart = "expert" not in self.model.config.to_json_string(use_diff=False)

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
        endings = self.endings(stop, kwargs)
        if endings is not None:
            criterion = StopEach(endings, start=context.shape[1], num_rows=len(context))
            found: Tensor = self.model.generate(
                input_ids=context,
                attention_mask=kwargs["attention_mask"],
                max_length=max_length,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([criterion]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
            )
            if not endings.is_unclear:
                return found
        return super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)  # type: ignore[misc,no-any-return]

    def endings(self, stop: Sequence[str], options: Mapping[str, Any]) -> Endings | None:
        """What tells where every answer ends by itself, or None where that would change its text.

        Args:
            stop: Texts that end an answer.
            options: What else lm-eval gives to `generate`.
        """
        eos = _as_set(self.model.generation_config.eos_token_id)
        has_beams = (self.model.generation_config.num_beams or 1) > 1
        is_plain = options.get("do_sample") is False and options.keys() <= PLAIN and not has_beams
        if not self.rows_are_apart or not is_plain or self._hides(stop, eos):
            return None
        return Endings(self.tokenizer, stop, eos)

    def _hides(self, stop: Sequence[str], eos: frozenset[int]) -> bool:
        """Whether a stop text is left out when the answer is decoded, as special tokens are.

        lm-eval does not cut a text there, so what comes behind matters. A model's own end tokens are no such
        case, as nothing comes behind them.
        """
        ends = {self.tokenizer.decode([token]) for token in eos}
        special = self.tokenizer.all_special_tokens
        return any(token in text for text in stop if text not in ends for token in special)


class Endings:
    """Finds where answers end.

    Args:
        tokenizer: Its tokenizer.
        stop: Texts that end an answer.
        eos: Tokens that end an answer.

    Attributes:
        is_unclear: A stop text was seen that is not in the text as lm-eval decodes it. What was generated is of no
            use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._eos = eos
        # lm-eval looks at two tokens more than the text has, as it may be cut into tokens in another way.
        self._window = 2 + max(len(tokenizer.encode(text, add_special_tokens=False)) for text in stop)
        self.is_unclear = False

    def over(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Tell for each answer whether its last token ended it."""
        recent = self._tokenizer.batch_decode([ids[-self._window :] for ids in answers])
        return [self._is_over(ids, text) for ids, text in zip(answers, recent, strict=True)]

    def _is_over(self, ids: Sequence[int], recent: str) -> bool:
        if ids[-1] in self._eos:
            return True
        if not any(end in recent for end in self._stop):
            return False
        answer = self._tokenizer.decode(ids, skip_special_tokens=True)
        found = any(end in answer for end in self._stop)
        self.is_unclear |= not found
        return found


class StopEach(StoppingCriteria):  # type: ignore[misc]
    """Ends every sequence of a batch on its own, and all of them once an ending is unclear.

    Args:
        endings: Finds where answers end.
        start: Length of the prompts.
        num_rows: Number of sequences.
    """

    def __init__(self, endings: Endings, *, start: int, num_rows: int) -> None:
        self._endings = endings
        self._start = start
        self._over = [False] * num_rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Tell for each of the B sequences whether it is over."""
        import torch

        open_rows = [row for row, over in enumerate(self._over) if not over]
        answers = input_ids[open_rows, self._start :].tolist()
        for row, is_over in zip(open_rows, self._endings.over(answers), strict=True):
            self._over[row] = is_over
        over = [True] * len(self._over) if self._endings.is_unclear else self._over
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
