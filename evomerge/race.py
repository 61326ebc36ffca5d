"""Scores a generation in blocks of documents and stops candidates that cannot matter any more.

    candidates ─ block 0 ─► barrier ─ block 1 ─► barrier ─ ... ─► last block
                               │ out: too unlikely among the best
                               │ settled: likely among the best, unlikely the best of the run

Decisions fall only at barriers, when all candidates that still race are scored on the same documents, and they
follow from recorded scores alone. Every block is recorded when it arrives, so a run that is continued scores no
block again and decides the same. `fitness.posterior` and `fitness.racing` compute the chances, `fitness.blocks`
the order of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint, judge
from evomerge.fitness.objectives import Objective
from evomerge.fitness.posterior import Array, Reference, Seen, draw_means
from evomerge.fitness.racing import Budget, Merit, Reached, Standing, Stop, standings
from evomerge.fitness.samples import Samples, estimated_metrics, joined, mean_metrics, restricted
from evomerge.journal import Journal
from evomerge.recipe import Recipe
from evomerge.records import Block, Metrics, Outcome, Status
from evomerge.run_dir import RunDir
from evomerge.workers.base import Job

Evaluate = Callable[[Sequence[Job]], Iterator[tuple[int, Outcome]]]


@dataclass(frozen=True, kw_only=True)
class Course:
    """What candidates race over.

    Attributes:
        blocks: The documents of each block.
        error_rate: Largest expected share of a generation's best that goes out.
        front: Whether candidates go on that may be on the Pareto front.
    """

    blocks: Sequence[tuple[DocumentSet, ...]]
    error_rate: float
    front: bool = False

    @property
    def totals(self) -> dict[str, int]:
        """Task -> number of its documents."""
        totals: dict[str, int] = {}
        for block in self.blocks:
            for subset in block:
                totals[subset.name] = totals.get(subset.name, 0) + len(subset.doc_ids)
        return totals


@dataclass(frozen=True, kw_only=True)
class Incumbent:
    """The best of the run so far, which was scored on all documents.

    Attributes:
        merit: What it reaches.
        samples: Its scores.
        front: Metrics of the models on the Pareto front so far.
    """

    merit: Merit
    samples: Samples
    front: Sequence[Metrics] = ()


@dataclass(frozen=True)
class Finish:
    """How the evaluation of a candidate came out.

    Attributes:
        outcome: Its outcome on the documents it was scored on; `pruned` if a race
            stopped it before the last block.
        fitness: Its fitness on all documents, estimated if a race stopped it; None unless it was scored.
        violations: Label of every constraint it violates -> by how much, likewise.
        screen: What it reached in the screening, if there was one.
        out_after: Number of blocks after which it went out of a race; 0 if it did not.
    """

    outcome: Outcome
    fitness: float | None
    violations: Mapping[str, float] = field(default_factory=dict)
    screen: float | None = None
    out_after: int = 0


@dataclass(kw_only=True)
class _Runner:
    """A candidate in the race; `stop` is how it was stopped, if it was."""

    number: int
    recipe: Recipe
    blocks: list[Block]
    samples: Samples
    stop: Stop | None = None

    @property
    def failed(self) -> bool:
        return bool(self.blocks) and self.blocks[-1].status is not Status.OK

    @property
    def out(self) -> bool:
        return self.stop is not None and self.stop.out


class Race:
    """One generation's race.

    Args:
        course: What it goes over.
        objectives: What the fitness is made of.
        constraints: What a candidate must hold.
        run_dir: Where scores are written.
        journal: Where blocks are recorded.
        evaluate: Scores jobs.
    """

    def __init__(
        self,
        course: Course,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        run_dir: RunDir,
        journal: Journal,
        evaluate: Evaluate,
    ) -> None:
        self._course = course
        self._objectives = objectives
        self._constraints = constraints
        self._run_dir = run_dir
        self._journal = journal
        self._evaluate = evaluate

    def score(
        self, recipes: Mapping[int, Recipe], wanted: int, incumbent: Incumbent | None = None
    ) -> dict[int, Finish]:
        """Race candidates against each other.

        Args:
            recipes: Number of the trial -> its recipe.
            wanted: How many of them the searcher selects.
            incumbent: The best of the run before them.
        """
        runners = [
            _Runner(number=number, recipe=recipe, blocks=[], samples={})
            for number, recipe in sorted(recipes.items())
        ]
        num_looks = len(self._course.blocks) - 1
        budget = Budget(self._course.error_rate, wanted, num_looks)
        for index in range(len(self._course.blocks)):
            racing = [runner for runner in runners if runner.stop is None and not runner.failed]
            self._run_block(index, racing)
            racing = [runner for runner in racing if not runner.failed]
            if index < num_looks and len(racing) > 1:
                settled = sum(runner.stop is not None and not runner.out for runner in runners)
                reached = self._reached(index, racing, incumbent)
                found = self._standings(reached, max(1, wanted - settled), incumbent)
                for place, stop in budget.stops(found).items():
                    racing[place].stop = stop
        whole = [runner.samples for runner in runners if runner.stop is None and not runner.failed]
        return {runner.number: self._finish(runner, whole) for runner in runners}

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

    def _reached(self, index: int, racing: Sequence[_Runner], incumbent: Incumbent | None) -> Reached:
        """Draw what the candidates reach on all documents, given their scores up to a block."""
        generator = np.random.default_rng(index)
        drawn: dict[tuple[str, str], Array] = {}
        for task, total in self._course.totals.items():
            measures = (*self._objectives, *self._constraints)
            keys = list(dict.fromkeys(item.key for item in measures if item.task == task))
            seen = Seen(
                scores_MCD=np.array([[r.samples[task].values[key] for r in racing] for key in keys]),
                total=total,
                reference=None if incumbent is None else _reference(incumbent, racing[0].samples, task, keys),
            )
            means_SMC = draw_means(seen, generator)
            drawn.update({(task, key): means_SMC[:, place] for place, key in enumerate(keys)})
        values_OSC = [item.value(drawn[item.task, item.key]) for item in self._objectives]
        weights_O = np.array([item.weight for item in self._objectives])
        fitness_SC = np.tensordot(weights_O / weights_O.sum(), np.array(values_OSC), axes=1)
        violated = (item.violation(drawn[item.task, item.key]) for item in self._constraints)
        return Reached(
            fitness_SC=fitness_SC,
            violated_SC=sum(violated, np.zeros_like(fitness_SC)),
            values_OSC=values_OSC if self._course.front else (),
        )

    def _standings(self, reached: Reached, wanted: int, incumbent: Incumbent | None) -> list[Standing]:
        if incumbent is None:
            return standings(reached, wanted)
        known = incumbent.front if self._course.front else ()
        front = [[item.value(item.of(metrics)) for item in self._objectives] for metrics in known]
        return standings(reached, wanted, incumbent.merit, front)

    def _finish(self, runner: _Runner, whole: Sequence[Samples]) -> Finish:
        """How the evaluation of a candidate came out.

        Args:
            runner: The candidate.
            whole: Scores of the candidates that were scored on all documents.
        """
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
        outcome = replace(outcome, metrics=mean_metrics(runner.samples), samples=runner.samples)
        metrics = outcome.metrics
        if runner.stop is not None:
            metrics = estimated_metrics(runner.samples, whole)
            outcome = replace(outcome, status=Status.PRUNED, reason=_reason(runner))
        judgement = judge(metrics, self._objectives, self._constraints)
        return Finish(
            outcome, judgement.fitness, judgement.violations, out_after=len(blocks) if runner.out else 0
        )


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


def _reference(incumbent: Incumbent, seen: Samples, task: str, keys: Sequence[str]) -> Reference:
    on_these = restricted(incumbent.samples, seen)[task].values
    on_all = incumbent.samples[task].values
    return Reference(
        scores_MD=np.array([on_these[key] for key in keys]),
        means_M=np.array([np.mean(on_all[key]) for key in keys]),
    )


def _reason(runner: _Runner) -> str:
    assert runner.stop is not None
    num = sum(len(scores.doc_ids) for scores in runner.samples.values())
    chances = runner.stop.standing
    how = "out" if runner.out else "settled"
    return (
        f"{how} after {num} documents: chance {chances.among_best:.2f} to be selected, {chances.best:.2f} to be "
        "the best of the run"
    )


def _sum(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0) for part in parts) for key in keys}
