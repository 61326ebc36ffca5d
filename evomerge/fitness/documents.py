"""Which documents a search sees, and which are held out to judge its result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from evomerge.experiment import Experiment
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint
from evomerge.fitness.harness import TaskLibrary


def choose_documents(
    experiment: Experiment, constraints: Sequence[Constraint], library: TaskLibrary
) -> tuple[tuple[DocumentSet, ...], tuple[DocumentSet, ...]]:
    """Choose the documents of the search and of the holdout for every task.

    Returns:
        Those of the search, scored in the fastest way, and those of the holdout, scored as the stock command
        does, which are none if an objective's task has none. A task that only constraints name may be missing from
        the holdout.
    """
    searched: dict[str, DocumentSet] = {}
    held_out: dict[str, DocumentSet] = {}
    evaluation = experiment.evaluation
    others = {item.task: item.holdout_task for item in experiment.objectives}
    for name in dict.fromkeys([*others, *(item.task for item in constraints)]):
        count, other = library.num_documents(name), others.get(name)
        share = evaluation.holdout if other is None else 0.0
        search_ids, holdout_ids = split_documents(
            library.split_name(name), count, holdout=share, limit=evaluation.limit
        )
        searched[name] = DocumentSet(
            task=name, doc_ids=search_ids, name=name, complete=len(search_ids) == count, exact=False
        )
        if other is not None:
            every = tuple(range(library.num_documents(other)))
            held_out[name] = DocumentSet(task=other, doc_ids=every, name=name, complete=True)
        elif holdout_ids:
            held_out[name] = DocumentSet(task=name, doc_ids=holdout_ids, name=name)
    complete = all(name in held_out for name in others)
    return tuple(searched.values()), tuple(held_out.values()) if complete else ()


def split_documents(
    name: str, count: int, *, holdout: float, limit: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a task's documents into search and holdout ones, the same way in every run.

    Documents are ordered by a hash of task name and position. The holdout takes the first share of that
    order, the search set the rest or its first `limit`.

    Returns:
        Ascending document ids of the search set and of the holdout.
    """
    order = sorted(
        range(count), key=lambda index: hashlib.blake2b(f"{name}\n{index}".encode(), digest_size=8).digest()
    )
    num_holdout = min(count - 1, max(1, round(count * holdout))) if holdout > 0 and count > 1 else 0
    searched = order[num_holdout:][:limit]
    return tuple(sorted(searched)), tuple(sorted(order[:num_holdout]))
