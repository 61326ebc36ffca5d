"""Names the winner: the best few candidates are scored a second time, on all search documents.

The best score of a search is the best of many, some of it luck: of the batches in which documents happened to be
scored, and where candidates race, of the documents they were scored on. So the best few are scored again, in
batches of other documents, and the second score alone decides. How far the two scores of a candidate lie apart is
the noise floor: differences between models that are no larger mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import judge
from evomerge.fitness.objectives import estimate
from evomerge.fitness.ranking import merit
from evomerge.fitness.samples import joined, mean_metrics
from evomerge.loop import Run
from evomerge.records import Final, Metrics, Status, Trial
from evomerge.rivals import Entry, score_entries
from evomerge.stages import WINNER, Stage, best_trial, decoded


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A candidate with its second score.

    Attributes:
        trial: Its trial.
        fitness: Its fitness on all search documents, the second time.
        standard_error: Standard error of that, if it can be known.
        metrics: Its metrics, the second time.
        violated: Sum of its relative violations of constraints, the second time.
        noise: How far that is from the first time, or None if the first time was not on all of them.
    """

    trial: Trial
    fitness: float
    standard_error: float | None
    metrics: Metrics
    violated: float
    noise: float | None


def confirm(
    run: Run, stages: Sequence[Stage], documents: Sequence[DocumentSet], *, count: int
) -> list[Confirmed]:
    """Score the best candidates of a run again and name the winner; what is recorded is not scored again.

    Args:
        run: The run whose last search is over.
        stages: Its searches.
        documents: The search documents.
        count: How many candidates, at least one.

    Returns:
        Them, from best to worst. Candidates that cannot be scored a second time are left out.

    Raises:
        RunStoppedError: A stop was asked for.
    """
    trials = shortlist(run.journal.trials, count)
    recipes = [decoded(trial, stages, run.journal.trials).recipe for trial in trials]
    finals = [
        score_entries(
            run,
            [
                Entry(name=f"trial {trial.number}, part {part}", recipe=recipe)
                for trial, recipe in zip(trials, recipes, strict=True)
            ],
            half,
            "confirm",
        )
        for part, half in enumerate(_halves(documents))
    ]
    found: list[Confirmed] = []
    for trial, *parts in zip(trials, *finals, strict=True):
        if any(final.status is not Status.OK for final in parts):
            continue
        samples = joined([run.run_dir.read_scores(final.scores) for final in parts])
        metrics = mean_metrics(samples)
        judgement = judge(metrics, run.objectives, run.constraints)
        second, violated = judgement.fitness, math.fsum(judgement.violations.values())
        first = trial.fitness if trial.status is Status.OK else None
        noise = None if first is None else abs(second - first)
        found.append(
            Confirmed(
                trial=trial,
                fitness=second,
                standard_error=estimate(samples, run.objectives).standard_error,
                metrics=metrics,
                violated=violated,
                noise=noise,
            )
        )
    ranked = sorted(found, key=lambda each: (each.violated, -each.fitness, each.trial.number))
    named = any(final.name == WINNER and final.stage == "confirm" for final in run.journal.finals)
    if ranked and not named:
        best = ranked[0]
        run.journal.append(
            Final(
                name=WINNER,
                stage="confirm",
                candidate=best.trial.candidate,
                recipe=decoded(best.trial, stages, run.journal.trials).recipe.to_dict(),
                status=Status.OK,
                metrics=best.metrics,
            )
        )
    return ranked


def shortlist(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The best candidates, each once; the best of those scored on all documents is always among them."""
    whole = best_trial(trials)
    assert whole is not None, "a search without a valid candidate ends with an error"
    scored = sorted(
        (trial for trial in trials if trial.fitness is not None and not trial.out_after),
        key=lambda trial: (*merit(trial), -trial.number),
        reverse=True,
    )
    first: dict[str, Trial] = {}
    for trial in (whole, *scored):
        first.setdefault(trial.candidate, trial)
    return list(first.values())[:count]


def _halves(documents: Sequence[DocumentSet]) -> list[tuple[DocumentSet, ...]]:
    """Every second document, and the others: other neighbours in a batch than the first time."""
    halves = []
    for start in (0, 1):
        parts = (replace(subset, doc_ids=subset.doc_ids[start::2], complete=False) for subset in documents)
        halves.append(tuple(part for part in parts if part.doc_ids))
    return [half for half in halves if half]
