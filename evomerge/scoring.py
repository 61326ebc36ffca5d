"""Scores the candidates of a generation: screened first where that is asked for, then raced or scored in full.

    candidates ─► screening ─► the better part ─► race, or all documents ─► finished
                      └────────► the others ─────────────────────────────► finished, pruned

Whatever is decided follows from journalled scores, so a run that is continued decides the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from evomerge.experiment import ScreenSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.constraints import Constraint, judge
from evomerge.fitness.objectives import Objective
from evomerge.fitness.screen import passing, screening_documents, screening_score
from evomerge.journal import Journal
from evomerge.race import Course, Evaluate, Finish, Incumbent, Race, record_block
from evomerge.recipe import Recipe
from evomerge.records import Outcome, Status
from evomerge.run_dir import RunDir
from evomerge.workers.base import Job

SCREENING = -1
"""Number of the screening among a trial's blocks."""


class Scorer:
    """Scores generations.

    Args:
        documents: What candidates are scored on.
        objectives: What the fitness is made of.
        constraints: What a candidate must hold to win.
        course: What candidates race over; None to score all of them on all documents.
        screen: How candidates are screened; None to score all of them.
        run_dir: Where scores are written.
        journal: What is recorded already, and where blocks are recorded.
        evaluate: Scores jobs.
    """

    def __init__(
        self,
        *,
        documents: tuple[DocumentSet, ...],
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        course: Course | None,
        screen: ScreenSettings | None,
        run_dir: RunDir,
        journal: Journal,
        evaluate: Evaluate,
    ) -> None:
        self._documents = documents
        self._objectives = objectives
        self._constraints = constraints
        self._course = course
        self._screen = screen
        self._run_dir = run_dir
        self._journal = journal
        self._evaluate = evaluate

    def score(
        self, recipes: Mapping[int, Recipe], wanted: int, incumbent: Incumbent | None = None
    ) -> Iterator[tuple[int, Finish]]:
        """Score the candidates of a generation that are not recorded as trials.

        Those that are recorded take part over their recorded scores, so that the others meet the same rivals.

        Args:
            recipes: Number of the trial -> its recipe, each recipe once.
            wanted: How many of them the searcher selects.
            incumbent: The best of the run before them.
        """
        missing = [number for number in recipes if number not in self._journal.trials_by_number]
        if not missing:
            return
        screened = {number: Finish(Outcome(status=Status.OK), None) for number in recipes}
        if self._screen is not None:
            screened = self._screened(recipes, self._screen)
        going = {n: recipe for n, recipe in recipes.items() if screened[n].outcome.status is Status.OK}
        for number in missing:
            if number not in going:
                yield number, screened[number]
        for number, done in self._in_full(going, [n for n in missing if n in going], wanted, incumbent):
            yield number, replace(done, screen=screened[number].screen)

    def _in_full(
        self,
        recipes: Mapping[int, Recipe],
        missing: Sequence[int],
        wanted: int,
        incumbent: Incumbent | None,
    ) -> Iterator[tuple[int, Finish]]:
        if self._course is not None and missing:
            race = Race(
                self._course,
                self._objectives,
                self._constraints,
                self._run_dir,
                self._journal,
                self._evaluate,
            )
            finished = race.score(recipes, wanted, incumbent)
            yield from ((number, finished[number]) for number in missing)
            return
        jobs = [Job(number=n, documents=self._documents, recipe=recipes[n]) for n in missing]
        for number, outcome in self._evaluate(jobs):
            if outcome.status is Status.OK:
                judgement = judge(outcome.metrics, self._objectives, self._constraints)
                yield number, Finish(outcome, judgement.fitness, judgement.violations)
            else:
                yield number, Finish(outcome, None)

    def _screened(self, recipes: Mapping[int, Recipe], settings: ScreenSettings) -> dict[int, Finish]:
        """Number of the trial -> `ok` if it goes on; else how it ended."""
        documents = screening_documents(self._documents, self._objectives)
        known = {
            n: self._journal.blocks[n, SCREENING] for n in recipes if (n, SCREENING) in self._journal.blocks
        }
        jobs = [
            Job(number=n, documents=documents, recipe=recipe)
            for n, recipe in recipes.items()
            if n not in known
        ]
        for number, outcome in self._evaluate(jobs):
            known[number] = record_block(
                self._journal, self._run_dir, number, SCREENING, recipes[number].hash, outcome
            )
        scores = {
            n: screening_score(block.metrics, self._objectives)
            for n, block in sorted(known.items())
            if block.status is Status.OK
        }
        passed = set(passing(scores, settings.keep)) if scores else set()
        found: dict[int, Finish] = {}
        for number, block in known.items():
            outcome = Outcome(
                status=block.status,
                reason=block.reason,
                seconds=block.seconds,
                attempts=block.attempts,
                counts=block.counts,
            )
            if number in scores and number not in passed:
                reason = f"left out by the screening, in which it reached {scores[number]:.4f}"
                outcome = replace(outcome, status=Status.PRUNED, reason=reason)
            found[number] = Finish(outcome, None, screen=scores.get(number))
        return found
