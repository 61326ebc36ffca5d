"""The audit of a run, made from its journal and score files: what its numbers are worth, and what may deceive.

- How many generated texts were cut off at the token limit, were empty, had no answer to read or were in another
  language than asked for; see `fitness.tallies`. A win that comes from fewer of these is a win of form.
- The noise floor: how far the fitness of a candidate moves when it is scored again in other batches.
- What the winner reached on the documents that chose it, which is too much, beside what it reached on others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.fitness.objectives import Estimate, Objective, estimate
from evomerge.fitness.optimism import MAX_CANDIDATES, optimism
from evomerge.fitness.ranking import merit
from evomerge.fitness.samples import Samples, joined
from evomerge.journal import Journal
from evomerge.measured import as_share
from evomerge.records import Status, Trial
from evomerge.report.holdout import HoldoutTable
from evomerge.run_dir import RunDir
from evomerge.stages import WINNER, best_trial, named_winner

LARGE = 0.05
"""Share of texts from which on something is said, and difference of two shares."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Some of a number of texts or documents."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return self.count / self.of


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is wrong with the texts of a model, or of all candidates of a search; None where it cannot be known.

    Attributes:
        truncated: Those that ran into the token limit.
        empty: Those of nothing but spaces.
        no_answer: Documents without an answer that could be read.
        wrong_language: Those in another language than asked for.
        no_mark: Texts to which a judge replied without a mark.
    """

    truncated: Share | None
    empty: Share | None
    no_answer: Share | None
    wrong_language: Share | None
    no_mark: Share | None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The winner's fitness on one set of documents.

    Attributes:
        on: `search`, `confirm` or `holdout`.
        fitness: The fitness with its standard error.
        num_candidates: Of how many candidates it is the best on these documents by this number; else 1.
    """

    on: str
    fitness: Estimate
    num_candidates: int = 1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The audit of a run.

    Attributes:
        models: Name of every model of the holdout table -> what is wrong with its texts.
        search: What is wrong with the texts of all candidates.
        candidates: How the evaluation of candidates ended -> how many did.
        noise_floor: The most by which the fitness of a candidate differed when it was scored a second time, in
            other batches; None if none was.
        num_scored_twice: Number of candidates it is the most of.
        winner: What the winner reached; empty before there is one.
        luck: How much of the winner's fitness on the search documents is expected to be luck, at least; None before
            the search is over, and where a single candidate was scored.
        warnings: What may deceive, in words.
    """

    models: Mapping[str, Texts]
    search: Texts
    candidates: Mapping[str, int]
    noise_floor: float | None
    num_scored_twice: int
    winner: tuple[Reached, ...]
    luck: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain values."""
        return asdict(self)


def audit_run(
    run_dir: RunDir, journal: Journal, objectives: Sequence[Objective], table: HoldoutTable | None
) -> Audit:
    """Audit a run; it may be going on.

    Args:
        run_dir: Its folder, with the score files.
        journal: Its journal.
        objectives: What the fitness is made of; those that need it know the sources.
        table: Its holdout table, if there is one.
    """
    trials, finals = journal.trials, journal.finals
    counts = {final.name: final.counts for final in finals if final.stage == "holdout"}
    models = {row.name: texts_of(counts[row.name]) for row in table.rows} if table is not None else {}
    searched: Counter[str] = Counter()
    for trial in trials:
        if trial.attempts:  # else its outcome is that of an earlier trial
            searched.update(trial.counts)
    search = texts_of(searched)
    second = _second_scores(run_dir, journal, objectives)
    noise = [
        abs(second[trial.candidate].mean - trial.fitness)
        for trial in _scored(trials).values()
        if trial.candidate in second and trial.status is Status.OK and trial.fitness is not None
    ]
    return Audit(
        models=models,
        search=search,
        candidates={
            status.value: sum(trial.status is status for trial in trials)
            for status in Status
            if status is Status.OK or any(trial.status is status for trial in trials)
        },
        noise_floor=max(noise, default=None),
        num_scored_twice=len(noise),
        winner=tuple(_reached(journal, second, table)),
        luck=_luck(run_dir, journal, objectives) if second or table is not None else None,
        warnings=tuple(_warnings(models, search, table)),
    )


def texts_of(counts: Mapping[str, int]) -> Texts:
    """What the tallies of an evaluation say of its texts."""

    def share(key: str, total: str) -> Share | None:
        # A share of nothing says nothing.
        return Share(count=counts.get(key, 0), of=counts[total]) if counts.get(total) else None

    return Texts(
        truncated=share("truncated", "generations"),
        empty=share("empty", "generations") if "empty" in counts else None,
        no_answer=share("no_answer", "answers_judged"),
        wrong_language=share("wrong_language", "languages_judged"),
        no_mark=share("unreadable", "judged"),
    )


def _scored(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Candidate -> its first trial that was scored, on all documents if there is one."""
    found: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: (trial.status is not Status.OK, trial.number)):
        if trial.fitness is not None:
            found.setdefault(trial.candidate, trial)
    return found


def _second_scores(run_dir: RunDir, journal: Journal, objectives: Sequence[Objective]) -> dict[str, Estimate]:
    """Candidate -> its fitness when it was scored a second time, on all search documents in several parts."""
    best = best_trial(journal.trials)
    if best is None or not best.scores:
        return {}
    whole = _documents(run_dir.read_scores(best.scores))
    parts: dict[str, list[Samples]] = {}
    for final in journal.finals:
        if final.stage == "confirm" and final.name != WINNER and final.status is Status.OK:
            parts.setdefault(final.candidate, []).append(run_dir.read_scores(final.scores))
    second = {candidate: joined(samples) for candidate, samples in parts.items()}
    # The second scoring may be under way, or a part of it may have failed.
    return {
        candidate: estimate(samples, objectives)
        for candidate, samples in second.items()
        if _documents(samples) == whole
    }


def _documents(samples: Samples) -> dict[str, tuple[int, ...]]:
    return {task: scores.doc_ids for task, scores in samples.items()}


def _reached(
    journal: Journal, second: Mapping[str, Estimate], table: HoldoutTable | None
) -> Iterator[Reached]:
    winner = named_winner(journal.trials, journal.finals)
    if winner is None or winner.fitness is None:
        return
    first = Estimate(mean=winner.fitness, standard_error=winner.standard_error)
    best = best_trial(journal.trials)
    is_best = best is not None and best.candidate == winner.candidate
    yield Reached(on="search", fitness=first, num_candidates=len(_scored(journal.trials)) if is_best else 1)
    if winner.candidate in second:
        yield Reached(on="confirm", fitness=second[winner.candidate], num_candidates=max(1, len(second)))
    if table is not None:
        yield Reached(on="holdout", fitness=table.rows[0].fitness)


def _luck(run_dir: RunDir, journal: Journal, objectives: Sequence[Objective]) -> float | None:
    whole = [
        trial for trial in _scored(journal.trials).values() if trial.status is Status.OK and trial.scores
    ]
    # One that violates a constraint wins only if all do.
    whole = [trial for trial in whole if not trial.violations] or whole
    if len(whole) < 2:
        return None
    best = sorted(whole, key=lambda trial: (*merit(trial), -trial.number), reverse=True)[:MAX_CANDIDATES]
    samples = [run_dir.read_scores(trial.scores) for trial in best]
    return optimism(samples, objectives, seed=journal.header.seed)


KINDS = {
    "truncated": ("cut off at the token limit", "more room (max_gen_toks) may change the ranking"),
    "empty": ("empty", "look at what the models say"),
    "no_answer": ("without an answer that can be read", "what they know does not show in such scores"),
    "wrong_language": ("in another language than asked for", "a metric that counts the language shows it"),
    "no_mark": (
        "without a readable mark of the judge, which counts as the worst",
        "look at the judge's prompt",
    ),
}
"""What may be wrong with texts -> in words, and what to make of it."""


def _warnings(models: Mapping[str, Texts], search: Texts, table: HoldoutTable | None) -> Iterator[str]:
    everyone = {**models, "all candidates": search}
    for kind, (words, advice) in KINDS.items():
        shares = {name: getattr(texts, kind) for name, texts in everyone.items()}
        many = [
            f"{name} {as_share(share.value)}"
            for name, share in shares.items()
            if share is not None and share.value > LARGE
        ]
        if many:
            yield f"many texts are {words}: {', '.join(many)}; {advice}"
    if table is not None:
        for kind, (words, _) in KINDS.items():
            yield from _compared(kind, words, models, table)


def _compared(kind: str, words: str, models: Mapping[str, Texts], table: HoldoutTable) -> Iterator[str]:
    """Name a difference between winner and rival that is large and no chance."""
    own, other = (getattr(models[name], kind) for name in (WINNER, table.rival))
    if own is None or other is None:
        return
    difference = own.value - other.value
    error = math.sqrt(sum(share.value * (1 - share.value) / share.of for share in (own, other)))
    if abs(difference) <= max(LARGE, 2 * error):
        return
    both = f"{as_share(own.value)} of the winner's texts are {words}, and {as_share(other.value)} of {table.rival}'s"
    if difference < 0 < table.test.difference:
        yield f"{both}: part of the winner's lead may come from this, not from better answers"
    elif difference > 0 > table.test.difference:
        yield f"{both}: part of what the winner lacks may come from this, not from worse answers"
    else:
        yield f"{both}: the two are not compared under the same conditions"
