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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from evomerge.checkpoints.durable import write_atomic
from evomerge.errors import NoValidCandidateError, ReplayMismatchError, RunStoppedError
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Objective, fitness
from evomerge.journal import Journal
from evomerge.merge.card import recipes_text
from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome, Outcome, Status, Trial
from evomerge.run_dir import RunDir
from evomerge.search import Searcher
from evomerge.spaces import SearchSpace
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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One search of a run; most runs have no other.

    Attributes:
        name: Names its winner, which the stage after it has as its first source model.
        space: Decodes its genomes.
        new_searcher: Makes a fresh searcher, which proposes the recorded genomes again when it is told the
            recorded fitness again.
        evaluations: Number of candidates to evaluate.
        first: Number of its first trial.
        depths: Its source models in their order, and the base -> number of their layers.
    """

    name: str
    space: SearchSpace
    new_searcher: Callable[[], Searcher]
    evaluations: int
    first: int = 0
    depths: Mapping[str, int] = field(default_factory=dict)

    def has(self, trial: Trial) -> bool:
        """Whether a trial belongs to this stage."""
        return self.first <= trial.number < self.first + self.evaluations


class Run:
    """One search of a run: its parts, wired together.

    Args:
        run_dir: The run's folder.
        journal: Its journal, open for appending.
        stage: The search.
        objectives: What the fitness is made of.
        documents: What candidates are scored on.
        evaluations: Number of candidates of all stages.
        merges: The winners of the stages before this one, by the names under which recipes use them.
        pool: Scores candidates.
        observer: Hears of progress.
        stop: Set when the run is to stop.
    """

    def __init__(
        self,
        *,
        run_dir: RunDir,
        journal: Journal,
        stage: Stage,
        objectives: Sequence[Objective],
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
            # What the budget leaves of the last generation is too little to judge a search by that has a best.
            if all(trial.fitness is None for trial in trials) and (is_complete or self.best is None):
                reasons = "; ".join(dict.fromkeys(trial.reason for trial in trials))
                raise NoValidCandidateError(
                    f"none of the {len(trials)} candidates of generation {generation} is valid, so the search "
                    f"has nothing to go by: {reasons}"
                )
            number += len(genomes)
            generation += 1
            if is_complete:
                searcher.tell([trial.fitness for trial in trials])
        best = self.best
        assert best is not None
        return best

    def _evaluate(self, genomes: Sequence[Genome], *, first: int, generation: int) -> list[Trial]:
        """Score one generation; trials are recorded as they arrive and returned in the order asked.

        A candidate that was scored before, under any genome, is not scored again, unless the machinery failed.
        """
        recorded = self.journal.trials_by_number
        recipes: dict[int, Recipe] = {}
        for number, genome in enumerate(genomes, start=first):
            if number in recorded:
                self._check_replay(recorded[number], genome)
            else:
                recipes[number] = self.stage.space.decode(genome)
        while recipes:
            known = {t.candidate: t for t in self.journal.trials if t.status is not Status.FAILED}
            new: dict[str, int] = {}
            for number, recipe in recipes.items():
                if recipe.hash in known:
                    trial = replace(known[recipe.hash], number=number, genome=genomes[number - first])
                    self._record(replace(trial, asked_after=first, seconds={}, attempts=0), generation)
                else:
                    new.setdefault(recipe.hash, number)
            jobs = [Job(number=n, documents=self._documents, recipe=recipes[n]) for n in new.values()]
            for number, outcome in self.outcomes(jobs):
                trial = self._trial(number, genomes[number - first], recipes[number], outcome, first)
                self._record(trial, generation)
            recipes = {number: recipe for number, recipe in recipes.items() if number not in recorded}
        return [recorded[number] for number in range(first, first + len(genomes))]

    def _record(self, trial: Trial, generation: int) -> None:
        self.journal.append(trial)
        best = self.best
        if best is not None and best.number == trial.number:
            self._write_best()
        self.write_status("searching", generation=generation)
        done = len(self.journal.trials)
        self.observer.trial(trial, done=done, total=self._evaluations, generation=generation, best=best)

    def _trial(
        self, number: int, genome: Genome, recipe: Recipe, outcome: Outcome, asked_after: int
    ) -> Trial:
        is_ok = outcome.status is Status.OK
        return Trial(
            number=number,
            candidate=recipe.hash,
            genome=genome,
            asked_after=asked_after,
            status=outcome.status,
            reason=outcome.reason,
            fitness=fitness(outcome.metrics, self.objectives) if is_ok else None,
            metrics=outcome.metrics,
            scores=self.run_dir.write_scores(f"{number}-search", outcome.samples) if is_ok else "",
            seconds=outcome.seconds,
            attempts=outcome.attempts,
            counts=outcome.counts,
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
            RunStoppedError: A stop was asked for.
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
                **progress(self.journal.trials, self._evaluations),
                "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **more,
            }
        )


def progress(trials: Sequence[Trial], total: int) -> dict[str, Any]:
    """How far a search is, as plain values: `evaluations`, `invalid` and `best`."""
    best = best_trial(trials)
    return {
        "evaluations": {"done": len(trials), "total": total},
        "invalid": sum(trial.fitness is None for trial in trials),
        "best": None
        if best is None
        else {
            "trial": best.number,
            "candidate": best.candidate,
            "fitness": best.fitness,
            "metrics": best.metrics,
        },
    }


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The valid trial of the highest fitness, the earliest of equals."""
    valid = [trial for trial in trials if trial.fitness is not None]
    return max(valid, key=lambda trial: (trial.fitness, -trial.number), default=None)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A trial with what it stands for.

    Attributes:
        trial: The trial.
        stage: The search that asked for it.
        recipe: Its recipe.
        merges: Recipes of the merges that it names as its models.
    """

    trial: Trial
    stage: Stage
    recipe: Recipe
    merges: tuple[Recipe, ...]


def decoded(trial: Trial, stages: Sequence[Stage], trials: Sequence[Trial]) -> Decoded:
    """Decode a trial of a run with these stages and trials."""
    stage = next(stage for stage in stages if stage.has(trial))
    return Decoded(
        trial=trial,
        stage=stage,
        recipe=stage.space.decode(trial.genome),
        merges=merges_before(stages, stage, trials),
    )


def merges_before(stages: Sequence[Stage], stage: Stage, trials: Sequence[Trial]) -> tuple[Recipe, ...]:
    """The winners of the searches before one, by the names under which its recipes use them."""
    named: list[Recipe] = []
    for earlier in stages[: stages.index(stage)]:
        best = best_trial([trial for trial in trials if earlier.has(trial)])
        assert best is not None, "a search begins when those before it are over"
        named.append(earlier.space.decode(best.genome).model_copy(update={"name": earlier.name}))
    return tuple(named)


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

    Args:
        run_dir: Where to.
        recipe: The recipe.
        trial: Its trial.
        merges: Recipes of the merges that it names as its models.
    """
    comment = f"# trial {trial.number}, fitness {trial.fitness:.6g} on the search documents\n"
    write_atomic(run_dir.best_recipe, comment + recipes_text(recipe, merges))
