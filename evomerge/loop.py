"""The search loop: ask, evaluate, record, tell.

     experiment.yml -> Experiment ──> SearchSpace   Searcher   WorkerPool   Journal
                                          │            │           │           │
       loop:   searcher.ask() ─ genome ─> space.decode() ─ recipe ─> worker: sources -> live model
                                                                          │
               searcher.tell() <─ fitness <─ journal.append(trial) <─ outcome ┘   (lm-eval, per document)
                                                      │
                             best recipe, holdout table <─ journal      (finish.py)

A trial is on the disk before the searcher hears of it. Resuming builds a fresh searcher and tells it the
recorded fitness again; trials that are recorded are not evaluated again, and a genome that comes out
differently than recorded stops the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from evomerge.checkpoints.durable import write_atomic
from evomerge.errors import NoValidCandidateError, ReplayMismatchError, RunStoppedError
from evomerge.experiment import ScreenSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint
from evomerge.fitness.objectives import Objective, estimate
from evomerge.fitness.ranking import merit, pareto_front, told
from evomerge.journal import Journal
from evomerge.measured import with_error
from evomerge.merge.card import recipes_text
from evomerge.race import Course, Finish, Incumbent
from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome, Outcome, Status, Trial
from evomerge.run_dir import RunDir
from evomerge.scoring import Scorer
from evomerge.stages import Stage, best_trial, named_winner
from evomerge.versions import library_versions
from evomerge.workers.base import Job, WorkerPool

POLL_SECONDS = 0.5
"""How often a waiting loop looks whether it was asked to stop."""


class Observer(Protocol):
    """Hears of a run's progress; the command line's display is one."""

    def phase(self, text: str) -> None:
        """The run enters a phase, such as `starting workers`."""
        ...

    def search(self, dimensions: Sequence[Dimension]) -> None:
        """The search begins; genomes have these dimensions."""
        ...

    def event(self, text: str) -> None:
        """Something happened that a person should know of."""
        ...

    def trial(self, trial: Trial, *, done: int, total: int, generation: int, best: Trial | None) -> None:
        """A trial was recorded."""
        ...


class StopFlag:
    """Set by signal handlers, looked at by the loop between evaluations."""

    def __init__(self) -> None:
        self.reason = ""

    def set(self, reason: str) -> None:
        """Ask the run to stop."""
        self.reason = self.reason or reason

    def check(self, run_dir: RunDir) -> None:
        """Stop here if asked to.

        Raises:
            RunStoppedError: A stop was asked for.
        """
        if self.reason:
            raise RunStoppedError(
                f"stopped by {self.reason}; everything recorded is safe, `evomerge resume {run_dir.path}` continues"
            )


class Run:
    """One search of a run: its parts, wired together.

    Args:
        run_dir: The run's folder.
        journal: Its journal, open for appending.
        stage: The search.
        objectives: What the fitness is made of.
        constraints: What a candidate must hold to win.
        documents: What candidates are scored on.
        evaluations: Number of candidates of all stages.
        merges: The winners of the stages before this one, by the names under which recipes use them.
        pool: Scores candidates.
        observer: Hears of progress.
        stop: Set when the run is to stop.

    Attributes:
        course: What candidates race over; None to score all of them on all documents.
        screen: How candidates are screened; None to score all of them.
    """

    def __init__(
        self,
        *,
        run_dir: RunDir,
        journal: Journal,
        stage: Stage,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        documents: Sequence[DocumentSet],
        evaluations: int,
        merges: Sequence[Recipe] = (),
        pool: WorkerPool,
        observer: Observer,
        stop: StopFlag,
    ) -> None:
        self.run_dir = run_dir
        self.journal = journal
        self.stage = stage
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self.course: Course | None = None
        self.screen: ScreenSettings | None = None
        self.merges = tuple(merges)
        self.pool = pool
        self.observer = observer
        self.stop = stop
        self._documents = tuple(documents)
        self._evaluations = evaluations

    @property
    def best(self) -> Trial | None:
        """The best valid trial of this search so far, the earliest of equals."""
        return best_trial([trial for trial in self.journal.trials if self.stage.has(trial)])

    def search(self) -> Trial:
        """Evaluate candidates until the budget is spent, and return the best.

        Raises:
            NoValidCandidateError: A generation brought no valid candidate.
            ReplayMismatchError: The searcher proposes other genomes than recorded.
            RunStoppedError: A stop was asked for.
        """
        number, end = self.stage.first, self.stage.first + self.stage.evaluations
        generation = 0
        searcher = self.stage.new_searcher()
        self.observer.search(self.stage.space.dimensions)
        self._write_best()
        while number < end:
            proposed = searcher.ask()
            genomes = proposed[: end - number]
            trials = self._evaluate(genomes, first=number, generation=generation)
            is_complete = len(genomes) == len(proposed)
            failed = [trial for trial in trials if trial.fitness is None]
            # What the budget leaves of the last generation is too little to judge a search by that has a best. Of a
            # race those that it stopped are left, but not one that is known to be valid on all documents.
            if self.best is None or (is_complete and len(failed) == len(trials)):
                reasons = "; ".join(dict.fromkeys(trial.reason for trial in failed))
                raise NoValidCandidateError(
                    f"none of the {len(trials)} candidates of generation {generation} is valid, so the search "
                    f"has nothing to go by: {reasons}"
                )
            number += len(genomes)
            generation += 1
            if is_complete:
                searcher.tell(told(trials))
        best = self.best
        assert best is not None
        return best

    def _evaluate(self, genomes: Sequence[Genome], *, first: int, generation: int) -> list[Trial]:
        """Score one generation; trials are recorded as they arrive and returned in the order asked.

        A candidate that was scored on all documents before, or comes twice in the generation, is scored once.
        """
        recorded = self.journal.trials_by_number
        numbers = range(first, first + len(genomes))
        recipes = {number: self.stage.space.decode(genomes[number - first]) for number in numbers}
        for number in numbers:
            if number in recorded:
                self._check_replay(recorded[number], genomes[number - first])
        known = {
            trial.candidate: trial.number
            for trial in self.journal.trials
            if trial.number < first and trial.status in (Status.OK, Status.INVALID)
        }
        new = {n: recipe for n, recipe in recipes.items() if known.setdefault(recipe.hash, n) == n}
        scorer = Scorer(
            documents=self._documents,
            objectives=self.objectives,
            constraints=self.constraints,
            course=self.course,
            screen=self.screen,
            run_dir=self.run_dir,
            journal=self.journal,
            evaluate=self.outcomes,
        )
        for number, done in scorer.score(new, max(1, len(genomes) // 2), self._incumbent(numbers)):
            self._record(
                self._trial(number, genomes[number - first], recipes[number], done, first), generation
            )
        for number in numbers:
            if number not in recorded:
                same = replace(recorded[known[recipes[number].hash]], number=number, attempts=0, seconds={})
                self._record(replace(same, genome=genomes[number - first], asked_after=first), generation)
        return [recorded[number] for number in numbers]

    def _incumbent(self, numbers: range) -> Incumbent | None:
        """The best of this search before a generation, where there is a race to be held against it."""
        if self.course is None or all(number in self.journal.trials_by_number for number in numbers):
            return None
        earlier = [t for t in self.journal.trials if self.stage.has(t) and t.number < numbers.start]
        best = best_trial(earlier)
        if best is None:
            return None
        on_front = pareto_front(earlier, self.objectives) if self.course.front else []
        front = [trial.metrics for trial in on_front]
        return Incumbent(merit=merit(best), samples=self.run_dir.read_scores(best.scores), front=front)

    def _record(self, trial: Trial, generation: int) -> None:
        self.journal.append(trial)
        best = self.best
        if best is not None and best.number == trial.number:
            self._write_best()
        self.write_status("searching", generation=generation)
        done = len(self.journal.trials)
        self.observer.trial(trial, done=done, total=self._evaluations, generation=generation, best=best)

    def _trial(self, number: int, genome: Genome, recipe: Recipe, done: Finish, asked_after: int) -> Trial:
        outcome = done.outcome
        return Trial(
            number=number,
            candidate=recipe.hash,
            genome=genome,
            asked_after=asked_after,
            status=outcome.status,
            reason=outcome.reason,
            fitness=done.fitness,
            standard_error=estimate(outcome.samples, self.objectives).standard_error
            if outcome.samples
            else None,
            metrics=outcome.metrics,
            scores=self.run_dir.write_scores(f"{number}-search", outcome.samples) if outcome.samples else "",
            seconds=outcome.seconds,
            attempts=outcome.attempts,
            counts=outcome.counts,
            violations=done.violations,
            screen=done.screen,
            out_after=done.out_after,
        )

    def _check_replay(self, trial: Trial, genome: Genome) -> None:
        if trial.genome == genome:
            return
        now = library_versions()
        changed = [
            f"{name} {then} -> {now.get(name, 'not installed')}"
            for name, then in self.journal.header.versions.items()
            if now.get(name) != then
        ]
        cause = f"these changed since: {', '.join(changed)}" if changed else "no recorded version has changed"
        raise ReplayMismatchError(
            f"{self.run_dir.path}: replaying the search, trial {trial.number} comes out as another genome than "
            f"the journal recorded; {cause}. Install the recorded versions to continue this run, or start a "
            "new one"
        )

    def _write_best(self) -> None:
        best = best_trial(self.journal.trials)
        if best is not None and self.stage.has(best):
            write_recipe(self.run_dir, self.stage.space.decode(best.genome), best, self.merges)

    def outcomes(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Have jobs carried out; give each one's number and outcome as it finishes.

        Raises:
            RunStoppedError: A stop was asked for, or what scores candidates is out of reach.
        """
        for job in jobs:
            self.pool.submit(job)
        waiting = {job.number for job in jobs}
        while waiting:
            self.stop.check(self.run_dir)
            finished = self.pool.next(POLL_SECONDS)
            for event in self.pool.events:
                self.news(event)
            if finished is not None:
                number, outcome = finished
                waiting.remove(number)
                if outcome.status is Status.UNAVAILABLE:
                    raise RunStoppedError(
                        f"{outcome.reason}; everything recorded is safe, `evomerge resume {self.run_dir.path}` "
                        "continues when that is put right"
                    )
                yield number, checked(outcome)

    def news(self, text: str) -> None:
        """Log an event and tell the observer."""
        self.run_dir.log(text)
        self.observer.event(text)

    def write_status(self, state: str, **more: Any) -> None:
        """Replace `status.json`."""
        self.run_dir.write_status(
            {
                "state": state,
                **progress(self.journal, self._evaluations),
                "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **more,
            }
        )


def progress(journal: Journal, total: int) -> dict[str, Any]:
    """How far a run is, as plain values: `evaluations`, `invalid` and `best`, at the end the winner."""
    trials = journal.trials
    best = named_winner(trials, journal.finals)
    return {
        "evaluations": {"done": len(trials), "total": total},
        "invalid": sum(trial.status in (Status.INVALID, Status.FAILED) for trial in trials),
        "best": None
        if best is None
        else {
            "trial": best.number,
            "candidate": best.candidate,
            "fitness": best.fitness,
            "standard_error": best.standard_error,
            "metrics": best.metrics,
        },
    }


def checked(outcome: Outcome) -> Outcome:
    """An `ok` outcome whose metrics are not finite is an invalid one: a NaN must never win."""
    if outcome.status is not Status.OK:
        return outcome
    for task, metrics in outcome.metrics.items():
        for metric, value in metrics.items():
            if not math.isfinite(value):
                reason = f"{task} {metric} is {value}"
                return replace(outcome, status=Status.INVALID, reason=reason, metrics={}, samples={})
    return outcome


def write_recipe(run_dir: RunDir, recipe: Recipe, trial: Trial, merges: Sequence[Recipe] = ()) -> None:
    """Write the best recipe so far, with its trial and fitness as a comment.

    The fitness is that of the search, which is optimistic, as the recipe was chosen by it.

    Args:
        run_dir: Where to.
        recipe: The recipe.
        trial: Its trial.
        merges: Recipes of the merges that it names as its models.
    """
    assert trial.fitness is not None
    reached = with_error(trial.fitness, trial.standard_error)
    comment = f"# trial {trial.number}, fitness {reached} on the search documents, chosen by it: optimistic\n"
    write_atomic(run_dir.best_recipe, comment + recipes_text(recipe, merges))
