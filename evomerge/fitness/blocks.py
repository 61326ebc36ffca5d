"""Documents in blocks, each prefix of which is like the whole.

Documents are sorted by how well the source models do on them and taken in an order that spreads evenly over
that, so that a first small block holds easy and hard documents in the proportions of the whole set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Measure, Objective, document_shares
from evomerge.fitness.samples import Samples

MIN_DOCUMENTS = 2
"""Documents of a task in the first block at least; of fewer nothing can be said of their spread."""


def split_blocks(
    documents: Sequence[DocumentSet],
    shares: Sequence[float],
    difficulty: Mapping[str, Mapping[int, float]],
    *,
    seed: int,
) -> list[tuple[DocumentSet, ...]]:
    """Split every task's documents.

    Args:
        documents: The documents per task.
        shares: Share of all documents at the end of each block, rising; the last block ends with all of them.
        difficulty: Task -> document -> the mean score of the source models on it; a document without one lies
            in the middle.
        seed: Seed of the order among documents that are alike.

    Returns:
        Per block the documents of the tasks that have any left; no document is in two blocks.
    """
    ends = [*shares, 1.0]
    blocks: list[list[DocumentSet]] = [[] for _ in ends]
    for subset in documents:
        ordered = _ordered(subset, difficulty.get(subset.name, {}), seed)
        first = 0
        for block, share in zip(blocks, ends, strict=True):
            end = len(ordered) if share >= 1 else max(MIN_DOCUMENTS, round(share * len(ordered)))
            end = min(end, len(ordered))
            chosen = tuple(sorted(ordered[first:end]))
            if chosen:
                block.append(replace(subset, doc_ids=chosen, complete=False))
            first = max(first, end)
    return [tuple(block) for block in blocks if block]


def difficulty(
    samples: Sequence[Samples], objectives: Sequence[Objective], constraints: Sequence[Measure] = ()
) -> dict[str, dict[int, float]]:
    """Task -> document -> what models score on it on average, in shares of the fitness.

    On a task that no objective is on, it is what the first constraint is on.

    Args:
        samples: Scores of the models, all on the same documents.
        objectives: What the fitness is made of.
        constraints: What else is measured.
    """
    if not samples:
        return {}
    shares = [document_shares(each, objectives) for each in samples]
    means = {task: np.mean([each[task] for each in shares], axis=0) for task in shares[0]}
    for item in constraints:
        if item.task not in means:
            means[item.task] = np.mean([each[item.task].values[item.key] for each in samples], axis=0)
    return {
        task: dict(zip(samples[0][task].doc_ids, mean.tolist(), strict=True)) for task, mean in means.items()
    }


def _ordered(subset: DocumentSet, difficulty: Mapping[int, float], seed: int) -> list[int]:
    """The documents in an order whose prefixes spread evenly over their difficulty."""
    middle = sum(difficulty.values()) / len(difficulty) if difficulty else 0.0

    def place(doc: int) -> tuple[float, bytes]:
        key = f"{seed}\n{subset.task}\n{doc}".encode()
        return difficulty.get(doc, middle), hashlib.blake2b(key, digest_size=8).digest()

    ranked = sorted(subset.doc_ids, key=place)
    width = max(1, (len(ranked) - 1).bit_length())
    # The van der Corput sequence: ranks by their bits read backwards.
    return [ranked[rank] for rank in sorted(range(len(ranked)), key=lambda rank: f"{rank:0{width}b}"[::-1])]
