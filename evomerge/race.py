"""Scores a generation in blocks of documents and stops candidates that cannot matter any more.

    candidates ─ block 0 ─► barrier ─ block 1 ─► barrier ─ ... ─► last block
                               │ out: too unlikely among the best
                               │ settled: surely among the best, surely not the very best

Decisions fall only at barriers, when all candidates that still race are scored on the same documents, and they
follow from recorded scores alone. Every block is recorded when it arrives, so a run that is continued scores no
block again and decides the same. `fitness.racing` computes the chances, `fitness.blocks` the order of documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Objective, document_shares, fitness
from evomerge.fitness.racing import Seen, standings
from evomerge.journal import Journal
from evomerge.recipe import Recipe
from evomerge.records import Block, Metrics, Outcome, SampleScores, Status
from evomerge.run_dir import RunDir
from evomerge.workers.base import Job

Samples = Mapping[str, SampleScores]
Evaluate = Callable[[Sequence[Job]], Iterator[tuple[int, Outcome]]]


@dataclass(frozen=True, kw_only=True)
class Course:
    """What candidates race over.

    Attributes:
        blocks: The documents of each block.
        error_rate: Largest chance to be among the best at which a candidate goes out.
    """

    blocks: Sequence[tuple[DocumentSet, ...]]
    error_rate: float

    @property
    def totals(self) -> dict[str, int]:
        """Task -> number of its documents."""
        totals: dict[str, int] = {}
        for block in self.blocks:
            for subset in block:
                totals[subset.name] = totals.get(subset.name, 0) + len(subset.doc_ids)
        return totals


@dataclass(frozen=True)
class Finish:
    """How the evaluation of a candidate came out.

    Attributes:
        outcome: Its outcome on the documents it was scored on; `pruned` if a race
            stopped it before the last block.
        fitness: What the searcher is told, or None unless it was scored.
        screen: What it reached in the screening, if there was one.
    """

    outcome: Outcome
    fitness: float | None
    screen: float | None = None


@dataclass(kw_only=True)
class _Runner:
    """A candidate in the race; `out` is how it was stopped, if it was."""

    number: int
    recipe: Recipe
    blocks: list[Block]
    samples: Samples
    reason: str = ""
    out: bool = False

    @property
    def failed(self) -> bool:
        return bool(self.blocks) and self.blocks[-1].status is not Status.OK

    @property
    def stopped(self) -> bool:
        return bool(self.reason) or self.failed


class Race:
    """One generation's race.

    Args:
        course: What it goes over.
        objectives: What the fitness is made of.
        run_dir: Where scores are written.
        journal: Where blocks are recorded.
        evaluate: Scores jobs.
    """

    def __init__(
        self,
        course: Course,
        objectives: Sequence[Objective],
        run_dir: RunDir,
        journal: Journal,
        evaluate: Evaluate,
    ) -> None:
        self._course = course
        self._objectives = objectives
        self._run_dir = run_dir
        self._journal = journal
        self._evaluate = evaluate

    def score(self, recipes: Mapping[int, Recipe], wanted: int) -> dict[int, Finish]:
        """Race candidates against each other.

        Args:
            recipes: Number of the trial -> its recipe.
            wanted: How many of them the searcher selects.
        """
        runners = [
            _Runner(number=number, recipe=recipe, blocks=[], samples={})
            for number, recipe in sorted(recipes.items())
        ]
        for index in range(len(self._course.blocks)):
            racing = [runner for runner in runners if not runner.stopped]
            self._run_block(index, racing)
            racing = [runner for runner in racing if not runner.failed]
            if index + 1 < len(self._course.blocks) and len(racing) > 1:
                settled = sum(bool(runner.reason) and not runner.out for runner in runners)
                self._decide(index, racing, max(1, wanted - settled))
        told = _told(runners, self._objectives)
        return {runner.number: _finish(runner, told) for runner in runners}

    def _run_block(self, index: int, racing: Sequence[_Runner]) -> None:
        by_number = {runner.number: runner for runner in racing}
        for runner in racing:
            known = self._journal.blocks.get((runner.number, index))
            if known is not None:
                self._take(runner, known, self._run_dir.read_scores(known.scores) if known.scores else {})
                del by_number[runner.number]
        jobs = [
            Job(number=number, documents=self._course.blocks[index], recipe=runner.recipe)
            for number, runner in by_number.items()
        ]
        for number, outcome in self._evaluate(jobs):
            runner = by_number[number]
            block = record_block(self._journal, self._run_dir, number, index, runner.recipe.hash, outcome)
            self._take(runner, block, outcome.samples)

    def _take(self, runner: _Runner, block: Block, samples: Samples) -> None:
        runner.blocks.append(block)
        runner.samples = joined([runner.samples, samples])

    def _decide(self, index: int, racing: Sequence[_Runner], wanted: int) -> None:
        """Stop candidates at the barrier behind a block; the most promising one always goes on."""
        seen = [
            Seen(
                scores_CD=np.stack([document_shares(r.samples, self._objectives)[task] for r in racing]),
                total=total,
            )
            for task, total in self._course.totals.items()
        ]
        rate, count = self._course.error_rate, sum(part.scores_CD.shape[1] for part in seen)
        found = standings(seen, wanted, seed=index)
        favourite = max(range(len(racing)), key=lambda place: (found[place].best, -place))
        for place, (runner, standing) in enumerate(zip(racing, found, strict=True)):
            if place == favourite:
                continue
            chance = f"stopped after {count} documents: chance {standing.among_best:.2f} to be selected"
            if standing.among_best < rate:
                runner.reason, runner.out = chance, True
            elif standing.among_best > 1 - rate and standing.best < rate / 2:
                runner.reason = f"{chance}, {standing.best:.2f} to be the best"


def record_block(
    journal: Journal, run_dir: RunDir, number: int, index: int, candidate: str, outcome: Outcome
) -> Block:
    """Record how a trial came out on a block; return the block as it is recorded."""
    is_ok = outcome.status is Status.OK
    journal.append(
        Block(
            trial=number,
            block=index,
            candidate=candidate,
            status=outcome.status,
            reason=outcome.reason,
            metrics=outcome.metrics,
            scores=run_dir.write_scores(f"{number}-block-{index}", outcome.samples) if is_ok else "",
            seconds=outcome.seconds,
            attempts=outcome.attempts,
            counts=outcome.counts,
        )
    )
    return journal.blocks[number, index]


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


def mean_metrics(samples: Samples) -> Metrics:
    """Task -> metric -> mean over the documents."""
    return {
        task: {key: math.fsum(values) / len(values) for key, values in part.values.items()}
        for task, part in samples.items()
    }


def _told(runners: Sequence[_Runner], objectives: Sequence[Objective]) -> dict[int, float]:
    """What the searcher is told of every scored candidate.

    A candidate that was stopped is estimated from its documents and from how much better those who went to the
    end did on theirs than on these. Those that went out rank below all others, by the block they reached and
    then by their estimate.
    """
    scored = [runner for runner in runners if not runner.failed]
    whole = [runner for runner in scored if not runner.reason]
    estimates = {runner.number: _estimate(runner, whole, objectives) for runner in scored}
    kept = [runner for runner in scored if not runner.out]
    out = [runner for runner in scored if runner.out]
    told = {runner.number: estimates[runner.number] for runner in kept}
    bound = min(told.values(), default=math.inf)
    for runner in sorted(out, key=lambda r: (-len(r.blocks), -estimates[r.number], r.number)):
        bound = told[runner.number] = min(estimates[runner.number], math.nextafter(bound, -math.inf))
    return told


def _estimate(runner: _Runner, whole: Sequence[_Runner], objectives: Sequence[Objective]) -> float:
    if not runner.reason:
        return fitness(mean_metrics(runner.samples), objectives)
    own = document_shares(runner.samples, objectives)
    estimate = 0.0
    for task, shares in own.items():
        estimate += float(shares.mean())
        if whole:
            ids = runner.samples[task].doc_ids
            others = [(document_shares(w.samples, objectives)[task], w.samples[task].doc_ids) for w in whole]
            places = {doc: place for place, doc in enumerate(others[0][1])}
            on_these = [places[doc] for doc in ids]
            estimate += float(np.mean([scores.mean() - scores[on_these].mean() for scores, _ in others]))
    return estimate


def _finish(runner: _Runner, told: Mapping[int, float]) -> Finish:
    blocks = runner.blocks
    last = blocks[-1]
    outcome = Outcome(
        status=last.status,
        reason=last.reason,
        seconds=_sum([block.seconds for block in blocks]),
        counts={key: int(count) for key, count in _sum([block.counts for block in blocks]).items()},
        attempts=sum(block.attempts for block in blocks),
    )
    if runner.failed:
        return Finish(outcome, None)
    scored = replace(outcome, metrics=mean_metrics(runner.samples), samples=runner.samples)
    if runner.reason:
        scored = replace(scored, status=Status.PRUNED, reason=runner.reason)
    return Finish(scored, told[runner.number])


def _sum(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0) for part in parts) for key in keys}
