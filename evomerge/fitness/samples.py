"""Per-document scores from several passes put together, and what they say of a model scored on a part only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evomerge.records import Metrics, SampleScores

Samples = Mapping[str, SampleScores]
"""Task -> a model's scores on its documents."""


def joined(parts: Sequence[Samples]) -> Samples:
    """The scores of several passes over different documents as one, documents ascending."""
    ids: dict[str, list[int]] = {}
    columns: dict[str, dict[str, list[float]]] = {}
    for part in parts:
        for task, scores in part.items():
            ids.setdefault(task, []).extend(scores.doc_ids)
            for key, values in scores.values.items():
                columns.setdefault(task, {}).setdefault(key, []).extend(values)
    found: dict[str, SampleScores] = {}
    for task, docs in ids.items():
        order = sorted(range(len(docs)), key=docs.__getitem__)
        found[task] = SampleScores(
            doc_ids=tuple(docs[place] for place in order),
            values={key: tuple(column[place] for place in order) for key, column in columns[task].items()},
        )
    return found


def restricted(samples: Samples, like: Samples) -> Samples:
    """The scores on the documents that another model was scored on."""
    found: dict[str, SampleScores] = {}
    for task, part in like.items():
        places = {doc: place for place, doc in enumerate(samples[task].doc_ids)}
        on_these = [places[doc] for doc in part.doc_ids]
        found[task] = SampleScores(
            doc_ids=part.doc_ids,
            values={
                key: tuple(column[place] for place in on_these)
                for key, column in samples[task].values.items()
            },
        )
    return found


def mean_metrics(samples: Samples) -> Metrics:
    """Task -> metric -> mean over the documents."""
    return {
        task: {key: math.fsum(values) / len(values) for key, values in part.values.items()}
        for task, part in samples.items()
    }


def estimated_metrics(samples: Samples, others: Sequence[Samples]) -> Metrics:
    """What a model would reach on all documents.

    Args:
        samples: Its scores, on a part of them.
        others: Those of models that were scored on all documents: it is taken to do as much better on all of them
            than on this part as these do on average.
    """
    found = mean_metrics(samples)
    if not others:
        return found
    whole, part = (
        [mean_metrics(each) for each in others],
        [mean_metrics(restricted(each, samples)) for each in others],
    )
    return {
        task: {
            key: mean
            + math.fsum(w[task][key] - p[task][key] for w, p in zip(whole, part, strict=True)) / len(others)
            for key, mean in metrics.items()
        }
        for task, metrics in found.items()
    }
