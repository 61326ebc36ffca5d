"""What racing would have saved in finished runs, and what it would have dropped: replayed over recorded scores.

    python -m benchmarks.racing RUN_DIR [RUN_DIR ...] [--out FILE]

The runs must have scored every candidate on all documents (no `evaluation.racing`). Each of their generations races
again, by the code that a run uses, with scores read from the run's files instead of a model. Prints, per error rate:

- used: share of the sample evaluations;
- wrongly out: share of the truly better half of a generation that went out; candidates that tie with the best of
  the worse half are not counted, as there is no right or wrong among them;
- best lost: generations whose best candidate was stopped, and how much fitness the best that was left lacks;
- winner: fitness on all search documents of the run's winner, and of the one found among those that were not
  stopped.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.table import write_table
from evomerge.experiment import RacingSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.blocks import split_blocks
from evomerge.fitness.objectives import fitness
from evomerge.journal import Journal
from evomerge.race import Course, Race, Samples
from evomerge.recipe import Recipe
from evomerge.records import Header, Outcome, SampleScores, Status, Trial
from evomerge.report.status import read_objectives
from evomerge.run_dir import RunDir
from evomerge.workers.base import Job

ERROR_RATES = (0.1, 0.2, 0.25, 0.3, 0.4)


@dataclass(kw_only=True)
class Tally:
    """Counts over all generations of all runs."""

    used: int = 0
    total: int = 0
    wrong: int = 0
    better: int = 0
    lost: int = 0
    lacking: float = 0.0
    generations: int = 0


def main() -> None:
    """Replay and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    run_dirs = arguments.run_dirs
    rows = []
    for rate in ERROR_RATES:
        tally, found, reached = Tally(), [], []
        for path in run_dirs:
            best, left = replay(path, rate, tally)
            found.append(best)
            reached.append(left)
        rows.append(
            [
                f"{rate:g}",
                f"{tally.used / tally.total:.1%}",
                f"{tally.wrong / tally.better:.1%}",
                f"{tally.lost} of {tally.generations}, {tally.lacking / max(1, tally.lost):.4f}",
                f"{np.mean(found):.4f}",
                f"{np.mean(reached):.4f}",
            ]
        )
    header = ["error rate", "used", "wrongly out", "best lost", "winner, all documents", "winner, raced"]
    write_table(
        arguments.out,
        command="python -m benchmarks.racing RUN_DIR...",
        intro=f"{len(run_dirs)} finished runs, every generation raced again over recorded scores.",
        head=header,
        rows=rows,
    )


def replay(path: Path, rate: float, tally: Tally) -> tuple[float, float]:
    """Race every generation of a run; return the best fitness of all and of those that were not stopped."""
    source, recorded = RunDir(path), Journal.load(RunDir(path).journal)
    objectives = read_objectives(recorded)
    best = left = float("-inf")
    for number, trials in enumerate(_generations(recorded.trials)):
        samples = {trial.number: source.read_scores(trial.scores) for trial in trials}
        full = {trial.number: fitness(trial.metrics, objectives) for trial in trials}
        documents = [
            DocumentSet(task=task, doc_ids=scores.doc_ids, name=task)
            for task, scores in samples[trials[0].number].items()
        ]
        settings = RacingSettings(error_rate=rate)
        course = Course(
            blocks=split_blocks(documents, settings.blocks, {}, seed=number), error_rate=settings.error_rate
        )
        wanted = max(1, len(trials) // 2)
        with tempfile.TemporaryDirectory() as folder:
            run_dir = RunDir(Path(folder))
            run_dir.create()
            header = Header(experiment="", settings={}, inputs={}, versions={}, seed=0)
            with Journal.create(run_dir.journal, header) as journal:
                race = Race(course, objectives, run_dir, journal, _Recorded(samples, tally))
                finished = race.score({trial.number: _named(trial.number) for trial in trials}, wanted)
        stopped = {n for n, done in finished.items() if done.outcome.status is Status.PRUNED}
        out = {n for n in stopped if "to be the best" not in finished[n].outcome.reason}
        ranked = sorted(full, key=lambda n: -full[n])
        bound = full[ranked[wanted]]
        better = [n for n in ranked[:wanted] if full[n] > bound]
        tally.total += sum(len(subset.doc_ids) for subset in documents) * len(trials)
        tally.wrong += len(out & set(better))
        tally.better += len(better)
        tally.generations += 1
        top, top_left = full[ranked[0]], max(full[n] for n in full if n not in stopped)
        if top_left < top:
            tally.lost += 1
            tally.lacking += top - top_left
        best, left = max(best, top), max(left, top_left)
    return best, left


class _Recorded:
    """Scores jobs from recorded scores, and counts them."""

    def __init__(self, samples: dict[int, Samples], tally: Tally) -> None:
        self._samples = samples
        self._tally = tally

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        for job in jobs:
            found = {}
            for subset in job.documents:
                whole = self._samples[job.number][subset.name]
                place = {doc: index for index, doc in enumerate(whole.doc_ids)}
                values = {
                    key: tuple(column[place[doc]] for doc in subset.doc_ids)
                    for key, column in whole.values.items()
                }
                found[subset.name] = SampleScores(doc_ids=subset.doc_ids, values=values)
                self._tally.used += len(subset.doc_ids)
            yield job.number, Outcome(status=Status.OK, samples=found)


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
