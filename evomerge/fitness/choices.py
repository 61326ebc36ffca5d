"""Log-probabilities of the answers to a context, which is read once for all of them.

Legend: B contexts, T positions, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.fitness.shared_prefix import MIN_TOKENS, Prefix, Reading, common_prefix, read

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Ids = tuple[int, ...]
Choices = Mapping[Ids, Sequence[Ids]]
"""Context -> the answers to it."""

WORTH = 0.8
"""Share of the tokens of whole texts up to which reading contexts apart is worth its additional passes."""


def choices_of(requests: Sequence[Any]) -> dict[Ids, list[Ids]]:
    """The answers to every context, each once.

    Args:
        requests: lm-eval's (text, tokens of the context, tokens of the answer).
    """
    found: dict[Ids, dict[Ids, None]] = {}
    for _, context, answer in requests:
        found.setdefault(tuple(context), {})[tuple(answer)] = None
    return {context: list(answers) for context, answers in found.items()}


def pays(choices: Choices) -> bool:
    """Whether contexts and their common prefix hold enough of the tokens to be read apart."""
    shared = len(_prefix(choices))
    whole = sum(len(context) + len(answer) - 1 for context, answers in choices.items() for answer in answers)
    apart = shared + sum(
        len(context) - shared + sum(len(answer) - 1 for answer in answers)
        for context, answers in choices.items()
    )
    return apart <= WORTH * whole


def log_likelihoods(
    model: PreTrainedModel, choices: Choices, batch_size: int, softmax_dtype: Any
) -> dict[tuple[Ids, Ids], tuple[float, bool]]:
    """Log-probability of every answer behind its context, and whether greedy generation would give it.

    Args:
        model: The model.
        choices: Contexts and their answers.
        batch_size: Sequences that are read at the same time.
        softmax_dtype: Type in which logits are turned into log-probabilities, or None for the model's.
    """
    import torch

    found: dict[tuple[Ids, Ids], tuple[float, bool]] = {}
    prefix = Prefix(model, _prefix(choices))
    for contexts in _batches(choices, batch_size):
        logits, reading = prefix.read(contexts)
        log_probs = torch.log_softmax(logits, dim=-1, dtype=softmax_dtype)
        pairs = [(row, answer) for row, context in enumerate(contexts) for answer in choices[context]]
        for first in range(0, len(pairs), batch_size):
            some = pairs[first : first + batch_size]
            values = _score(model, log_probs, reading, some, softmax_dtype)
            for (row, answer), value in zip(some, values, strict=True):
                found[contexts[row], answer] = value
    return found


def _prefix(choices: Choices) -> Ids:
    shared = common_prefix(list(choices))
    return shared if len(shared) >= MIN_TOKENS else ()


def _batches(choices: Choices, size: int) -> Iterator[list[Ids]]:
    """Contexts of like length that have as many answers together as are read at the same time, or a single one."""
    batch: list[Ids] = []
    num_answers = 0
    for context in sorted(choices, key=lambda ids: (-len(ids), ids)):
        if batch and num_answers + len(choices[context]) > size:
            yield batch
            batch, num_answers = [], 0
        batch.append(context)
        num_answers += len(choices[context])
    yield batch


def _score(
    model: PreTrainedModel,
    first_BV: Tensor,
    reading: Reading,
    pairs: Sequence[tuple[int, Ids]],
    softmax_dtype: Any,
) -> list[tuple[float, bool]]:
    """Log-probabilities of answers, and whether every token of theirs is the most likely one.

    Args:
        model: The model.
        first_BV: Log-probabilities behind the contexts.
        reading: What was read of the contexts.
        pairs: The context's row and the tokens of every answer.
        softmax_dtype: As above.
    """
    import torch

    greedy = first_BV.argmax(-1).tolist()
    totals = [float(first_BV[row, answer[0]]) for row, answer in pairs]
    is_greedy = [greedy[row] == answer[0] for row, answer in pairs]
    longer = [place for place, (_, answer) in enumerate(pairs) if len(answer) > 1]
    if not longer:
        return list(zip(totals, is_greedy, strict=True))
    rows = [pairs[place][1] for place in longer]
    width = max(map(len, rows)) - 1
    device = first_BV.device
    ids = torch.tensor([[*row[:-1], *[0] * (width + 1 - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * (len(row) - 1) + [0] * (width + 1 - len(row)) for row in rows], device=device)
    reading = reading.select([pairs[place][0] for place in longer])
    logits = read(model, ids, reading, mask_BT=mask)
    for place, row, logits_TV in zip(longer, rows, logits, strict=True):
        wanted = torch.tensor(row[1:], device=device)
        log_probs = torch.log_softmax(logits_TV[: len(wanted)], dim=-1, dtype=softmax_dtype)
        totals[place] += float(log_probs.gather(1, wanted[:, None]).sum())
        is_greedy[place] &= bool((log_probs.argmax(-1) == wanted).all())
    return list(zip(totals, is_greedy, strict=True))
