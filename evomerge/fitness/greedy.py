"""Greedy generation that drops a sequence from its batch once it is over.

Less than transformers' `generate` does: no samplers, no scores in float32, no work for sequences that are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.fitness.fast_model import Endings
from evomerge.fitness.shared_prefix import Prefix, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel,
    prefix: Prefix,
    prompts: Sequence[Sequence[int]],
    endings: Endings,
    *,
    max_new: int,
) -> list[list[int]]:
    """Continue prompts with the most likely tokens.

    Args:
        model: The model.
        prefix: What all prompts begin with.
        prompts: Their tokens.
        endings: Tells where answers end; an unclear ending ends all.
        max_new: Longest answer in tokens.

    Returns:
        The answers, each up to the token that ended it.
    """
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    logits, reading = prefix.read(prompts)
    rows = list(range(len(prompts)))
    for step in range(max_new):
        # Several times as fast as argmax in bfloat16, and the first of equals too.
        tokens = logits.max(-1).indices
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        over = endings.over([answers[row] for row in rows])
        left = [place for place, is_over in enumerate(over) if not is_over]
        if not left or endings.is_unclear or step + 1 == max_new:
            break
        if len(left) < len(rows):
            rows = [rows[place] for place in left]
            reading.keep(left)
            tokens = tokens[torch.tensor(left, device=tokens.device)]
        logits = read(model, tokens[:, None], reading, keep=1)[:, -1]
    return answers
