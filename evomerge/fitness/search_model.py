"""Answers requests in the way that is fastest, for the scores that steer a search.

What all prompts have in common is read once (`shared_prefix`), so are the contexts of choices, and sequences that
are over leave their batch (`greedy`). In float32 scores are those of lm-eval's own way; in bfloat16 the rounding
differs. All of it rests on the documents and the weights only, so the same candidate scores the same on every worker.
Where a model or a request does not allow it, lm-eval's own way is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evomerge.fitness.choices import choices_of, log_likelihoods, pays
from evomerge.fitness.fast_model import FastModel
from evomerge.fitness.greedy import generate
from evomerge.fitness.shared_prefix import MIN_TOKENS, Prefix, can_share, common_prefix

if TYPE_CHECKING:
    from torch import Tensor


PLAIN_SETTINGS = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "min_p",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
}
"""Settings of a model's generation config that greedy generation has no use for, or that are heeded here. Others,
such as a repetition penalty, choose other tokens."""


class SearchModel(FastModel):
    """To be put before lm-eval's `HFLM` among the bases of a class.

    Attributes:
        exact: Whether requests are answered by the very batches of the stock command.
    """

    exact = True
    _prefix: Prefix | None = None

    def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[str]:
        """What the model says to each request."""
        is_plain = self.model.generation_config.to_diff_dict().keys() <= PLAIN_SETTINGS
        if not self.exact and requests and is_plain and self._can_share():
            shared = common_prefix([self.tok_encode(request.args[0]) for request in requests])
            self._prefix = Prefix(self.model, shared if len(shared) >= MIN_TOKENS else ())
        try:
            return super().generate_until(requests, *args, **kwargs)  # type: ignore[misc,no-any-return]
        finally:
            self._prefix = None

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        import torch

        max_new = max_length - context.shape[1]
        endings = None if self._prefix is None else self.endings(stop, kwargs)
        if endings is None or max_new < 1:
            return super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
        assert self._prefix is not None
        prompts = [
            ids[mask == 1].tolist() for ids, mask in zip(context, kwargs["attention_mask"], strict=True)
        ]
        shared = self._prefix.ids
        # A prompt that is too long has lost its beginning.
        keeps = all(len(row) > len(shared) and tuple(row[: len(shared)]) == shared for row in prompts)
        prefix = self._prefix if keeps else Prefix(self.model, ())
        answers = generate(self.model, prefix, prompts, endings, max_new=max_new)
        if endings.is_unclear:
            return super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
        width, pad = max(map(len, answers)), self.tokenizer.pad_token_id
        padded = [answer + [pad] * (width - len(answer)) for answer in answers]
        return torch.cat([context, torch.tensor(padded, device=context.device)], dim=1)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if not self.exact and requests and self._can_share():
            choices = choices_of(requests)
            fits = all(
                answer and len(context) + len(answer) <= self.max_length + 1
                for _, context, answer in requests
            )
            if fits and pays(choices):
                found = log_likelihoods(self.model, choices, self.batch_size, self.softmax_dtype)  # type: ignore[attr-defined]
                return [found[tuple(context), tuple(answer)] for _, context, answer in requests]
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _can_share(self) -> bool:
        return self.rows_are_apart and can_share(self.model)
