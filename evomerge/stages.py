"""The searches of a run, and what their trials stand for.

Most runs have one search. Where there are several, the winner of each is a source model of the next, so a recipe
of a later stage names merges of the stages before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.fitness.ranking import merit
from evomerge.recipe import Recipe
from evomerge.records import Final, Status, Trial
from evomerge.search import Searcher
from evomerge.spaces import SearchSpace

WINNER = "winner"
"""Name of the winner among the evaluations beside a search."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One search of a run; most runs have no other.

    Attributes:
        name: Names its winner, which the stage after it has as its first source model.
        space: Decodes its genomes.
        new_searcher: Makes a fresh searcher, which proposes the recorded genomes again when it is told the
            recorded fitness again.
        evaluations: Number of candidates to evaluate.
        donor: The model that gives candidates their config and tokenizer.
        first: Number of its first trial.
        depths: Its source models in their order, and the base -> number of their layers.
    """

    name: str
    space: SearchSpace
    new_searcher: Callable[[], Searcher]
    evaluations: int
    donor: str = ""
    first: int = 0
    depths: Mapping[str, int] = field(default_factory=dict)

    def has(self, trial: Trial) -> bool:
        """Whether a trial belongs to this stage."""
        return self.first <= trial.number < self.first + self.evaluations


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The best trial of those scored on all search documents, the earliest of equals.

    One that violates a constraint is the best only if all do.
    """
    valid = [trial for trial in trials if trial.status is Status.OK and trial.fitness is not None]
    return max(valid, key=lambda trial: (*merit(trial), -trial.number), default=None)


def named_winner(trials: Sequence[Trial], finals: Sequence[Final]) -> Trial | None:
    """The winner as it was named at the end of the search; until then, the best trial."""
    for final in finals:
        if final.name == WINNER and final.stage == "confirm":
            same = [trial for trial in trials if trial.candidate == final.candidate]
            # A race may have settled it; trials of the same candidate may also have been given up or left out.
            settled = [trial for trial in same if trial.fitness is not None and not trial.out_after]
            return best_trial(same) or max(settled, key=lambda trial: (*merit(trial), -trial.number))
    return best_trial(trials)


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
