"""What racing would have saved in finished runs, and what it would have lost: replayed over recorded scores.

    python -m benchmarks.racing RUN_DIR [RUN_DIR ...] [--front] [--recorded-only] [--out FILE]

The runs must have scored every candidate on all documents (no `evaluation.racing`). Each of their generations races
again, by the code that a run uses, with scores read from the run's files instead of a model. Prints, per error rate:

- used: share of the sample evaluations;
- wrongly out: share of the truly better half of a generation that went out, which the error rate bounds; candidates
  that tie with the best of the worse half are not counted, as there is no right or wrong among them;
- new bests lost: generations that brought a new best of the run that was stopped, of those that brought one;
- front: share of the run's Pareto front that is left, of those scored on all documents;
- winner: fitness on all search documents of the run's winner, and of the winner among those that races leave, the
  best few scored again as a run does;
- holdout: the same two on the run's holdout, and how many raced winners are within the standard error of the full
  run's.

Winners other than the recorded one are scored on the holdout, and the source models on the search documents to
order these, by the run's experiment, whose models and tasks must be where they were. `--recorded-only` does without:
there is no holdout then, and documents are in an arbitrary order.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.table import write_table
from evomerge.confirm import shortlist
from evomerge.experiment import RacingSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.blocks import difficulty, split_blocks
from evomerge.fitness.objectives import Estimate, Objective, estimate
from evomerge.fitness.ranking import pareto_front
from evomerge.fitness.samples import Samples, restricted
from evomerge.journal import Journal
from evomerge.prepare import PreparedRun, prepare
from evomerge.race import Course, Finish, Incumbent, Race
from evomerge.recipe import Recipe
from evomerge.records import Header, Outcome, SampleScores, Status, Trial
from evomerge.report.status import read_objectives
from evomerge.run_dir import RunDir
from evomerge.stages import best_trial, named_winner
from evomerge.workers.base import Job
from evomerge.workers.worker import Worker

ERROR_RATES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)


@dataclass(kw_only=True)
class Tally:
    """Counts over all generations of all runs."""

    used: int = 0
    total: int = 0
    wrong: int = 0
    better: int = 0
    lost: int = 0
    new_bests: int = 0
    generations: int = 0
    front: int = 0
    front_left: int = 0


def main() -> None:
    """Replay and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", type=Path, nargs="+")
    parser.add_argument("--front", action="store_true", help="race with `front: true`")
    parser.add_argument("--recorded-only", action="store_true", help="score no model")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    runs = [Recorded(path=path) for path in arguments.run_dirs]
    if not arguments.recorded_only:
        runs[0].difficulty = runs[0].source_scores()
        for run in runs[1:]:
            is_same = run.journal.header.inputs == runs[0].journal.header.inputs
            run.difficulty = runs[0].difficulty if is_same else run.source_scores()
    rows, generations = [], 0
    for rate in ERROR_RATES:
        tally = Tally()
        winners = [replay(run, RacingSettings(error_rate=rate, front=arguments.front), tally) for run in runs]
        generations = tally.generations
        rows.append(
            [
                f"{rate:g}",
                f"{tally.used / tally.total:.1%}",
                f"{tally.wrong / tally.better:.1%}",
                f"{tally.lost} of {tally.new_bests}",
                f"{tally.front_left / tally.front:.0%}",
                f"{np.mean([run.winner.fitness for run in runs]):.4f}",
                f"{np.mean([winner.fitness for winner in winners]):.4f}",
                *([] if arguments.recorded_only else _holdout_columns(runs, winners)),
            ]
        )
    header = ["error rate", "used", "wrongly out", "new bests lost", "front", "winner, full", "winner, raced"]
    if not arguments.recorded_only:
        header += ["holdout, full", "holdout, raced", "within its standard error"]
    write_table(
        arguments.out,
        command="python -m benchmarks.racing RUN_DIR...",
        intro=f"{len(runs)} runs, {generations} generations, each raced again over recorded scores.",
        head=header,
        rows=rows,
    )


@dataclass(kw_only=True)
class Recorded:
    """A finished run."""

    path: Path
    difficulty: dict[str, dict[int, float]] = field(default_factory=dict)
    _held_out: dict[str, Estimate] = field(default_factory=dict)

    @cached_property
    def folder(self) -> RunDir:
        """Its folder."""
        return RunDir(self.path)

    @cached_property
    def journal(self) -> Journal:
        """What it recorded."""
        return Journal.load(self.folder.journal)

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What its fitness is made of."""
        return read_objectives(self.journal)

    @cached_property
    def prepared(self) -> PreparedRun:
        """Its experiment, with models and tasks."""
        return prepare(self.folder.experiment)

    @property
    def winner(self) -> Trial:
        """The winner it named."""
        found = named_winner(self.journal.trials, self.journal.finals)
        assert found is not None
        return found

    def source_scores(self) -> dict[str, dict[int, float]]:
        """Task -> document -> what the source models score on average, as a run that races finds it out."""
        worker = Worker(replace(self.prepared.spec, statistics=None))
        samples = []
        for model in self.prepared.checkpoints.values():
            job = Job(number=0, documents=self.prepared.search_documents, checkpoint=model.folder)
            outcome = worker.run(job)
            assert outcome.status is Status.OK, outcome.reason
            samples.append(outcome.samples)
        return difficulty(samples, self.objectives)

    def holdout(self, trial: Trial) -> Estimate:
        """A trial's fitness on the holdout: recorded if it is the winner's, else scored now."""
        if trial.candidate not in self._held_out:
            held_out = {f.candidate: f for f in self.journal.finals if f.stage == "holdout" and f.scores}
            if trial.candidate in held_out:
                samples = self.folder.read_scores(held_out[trial.candidate].scores)
            else:
                recipe = self.prepared.stages[0].space.decode(trial.genome)
                job = Job(number=0, documents=self.prepared.holdout_documents, recipe=recipe)
                outcome = Worker(replace(self.prepared.spec, statistics=None)).run(job)
                assert outcome.status is Status.OK, outcome.reason
                samples = outcome.samples
            self._held_out[trial.candidate] = estimate(samples, self.objectives)
        return self._held_out[trial.candidate]


def _holdout_columns(runs: Sequence[Recorded], winners: Sequence[Trial]) -> list[str]:
    full = [run.holdout(run.winner) for run in runs]
    raced = [run.holdout(winner) for run, winner in zip(runs, winners, strict=True)]
    good = sum(r.mean >= f.mean - f.standard_error for f, r in zip(full, raced, strict=True))
    means = [f"{np.mean([each.mean for each in column]):.4f}" for column in (full, raced)]
    return [*means, f"{good} of {len(runs)}"]


def replay(run: Recorded, settings: RacingSettings, tally: Tally) -> Trial:
    """Race every generation of a run; return the winner among the candidates that were not stopped."""
    recorded = {trial.number: trial for trial in run.journal.trials}
    raced: list[Trial] = []
    for number, trials in enumerate(_generations(run.journal.trials)):
        best = best_trial([trial for trial in recorded.values() if trial.number < trials[0].number])
        finished = _race(run, trials, best, settings, number, tally)
        for trial in trials:
            done = finished[trial.number]
            raced.append(
                replace(trial, status=done.outcome.status, fitness=done.fitness, out_after=done.out_after)
            )
        _count(tally, trials, best, raced[-len(trials) :])
    left = {trial.number for trial in raced if trial.status is Status.OK}
    front = pareto_front(list(recorded.values()), run.objectives)
    tally.front += len(front)
    tally.front_left += sum(trial.number in left for trial in front)
    again = [recorded[trial.number] for trial in shortlist(raced, 3)]
    winner = best_trial(again)
    assert winner is not None
    return winner


def _race(
    run: Recorded,
    trials: Sequence[Trial],
    best: Trial | None,
    settings: RacingSettings,
    number: int,
    tally: Tally,
) -> dict[int, Finish]:
    samples = {trial.number: run.folder.read_scores(trial.scores) for trial in trials}
    documents = [
        DocumentSet(task=task, doc_ids=scores.doc_ids, name=task)
        for task, scores in samples[trials[0].number].items()
    ]
    course = Course(
        blocks=split_blocks(documents, settings.blocks, run.difficulty, seed=number),
        error_rate=settings.error_rate,
        front=settings.front,
    )
    incumbent = None
    if best is not None and best.fitness is not None:
        earlier = [trial for trial in run.journal.trials if trial.number < trials[0].number]
        incumbent = Incumbent(
            merit=(0.0, best.fitness),
            samples=run.folder.read_scores(best.scores),
            front=[trial.metrics for trial in pareto_front(earlier, run.objectives)],
        )
    tally.total += sum(len(subset.doc_ids) for subset in documents) * len(trials)
    memory = Path("/dev/shm")  # noqa: S108 - what is made durable there costs nothing
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        run_dir = RunDir(Path(scratch))
        run_dir.create()
        header = Header(experiment="", settings={}, inputs={}, versions={}, seed=0)
        with Journal.create(run_dir.journal, header) as journal:
            race = Race(course, run.objectives, (), run_dir, journal, _Scores(samples, tally))
            recipes = {trial.number: _named(trial.number) for trial in trials}
            return race.score(recipes, max(1, len(trials) // 2), incumbent)


def _count(tally: Tally, trials: Sequence[Trial], best: Trial | None, raced: Sequence[Trial]) -> None:
    """Add a generation: as it was scored in full, the best before it, and as it was raced."""
    full = {trial.number: trial.fitness or 0.0 for trial in trials}
    out = {trial.number for trial in raced if trial.out_after}
    whole = {trial.number for trial in raced if trial.status is Status.OK}
    ranked = sorted(full, key=lambda n: (-full[n], n))
    wanted = max(1, len(trials) // 2)
    better = {n for n in ranked[:wanted] if full[n] > full[ranked[wanted]]}
    tally.generations += 1
    tally.wrong += len(out & better)
    tally.better += len(better)
    top = full[ranked[0]]
    if best is None or top > (best.fitness or 0.0):
        tally.new_bests += 1
        tally.lost += all(full[n] < top for n in whole)


class _Scores:
    """Scores jobs from recorded scores, and counts them."""

    def __init__(self, samples: dict[int, Samples], tally: Tally) -> None:
        self._samples = samples
        self._tally = tally

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        for job in jobs:
            wanted = {
                subset.name: SampleScores(doc_ids=subset.doc_ids, values={}) for subset in job.documents
            }
            self._tally.used += sum(len(subset.doc_ids) for subset in job.documents)
            yield (
                job.number,
                Outcome(status=Status.OK, samples=restricted(self._samples[job.number], wanted)),
            )


def _generations(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    by_ask: dict[int, list[Trial]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.status is Status.OK and trial.attempts:
            by_ask[trial.asked_after].append(trial)
    yield from (found for found in by_ask.values() if len(found) >= 4)


def _named(number: int) -> Recipe:
    """A recipe of its own for every trial; nothing is merged here."""
    return Recipe.from_dict({"merge_method": "linear", "models": [{"model": f"trial-{number}"}]})


if __name__ == "__main__":
    main()
