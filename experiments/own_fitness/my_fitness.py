"""Two functions to search by: one looks at what the model says, the other at the model itself.

Each gives one number per document, in the documents' order. Documents are the lines of the task's data file.
"""

from __future__ import annotations

from typing import Any

import torch


def letters_right(documents: list[dict[str, Any]], generations: list[str]) -> list[float]:
    """Share of the answer's letters that stand where they should: credit for answers that are nearly right."""
    scores = []
    for document, text in zip(documents, generations, strict=True):
        answer = document["answer"]
        right = sum(said == wanted for said, wanted in zip(text, answer, strict=False))
        scores.append(right / max(len(answer), len(text)))
    return scores


def kana_share(model: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> list[float]:
    """Probability that the answer begins in kana or kanji, whatever it says."""
    tokens = [token for text, token in tokenizer.get_vocab().items() if len(text) == 1 and ord(text) > 0x3000]
    prompts = tokenizer(
        [document["prompt"] for document in documents], return_tensors="pt", padding=True, padding_side="left"
    )
    logits = model(**prompts.to(model.device)).logits[:, -1].float()
    return torch.softmax(logits, dim=-1)[:, tokens].sum(dim=-1).tolist()
