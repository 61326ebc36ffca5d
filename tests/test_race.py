"""A race stops who cannot matter, by constraints first, and nobody who may become the best of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.blocks import split_blocks
from evomerge.fitness.constraints import Constraint
from evomerge.fitness.objectives import Objective
from evomerge.fitness.ranking import merit, told
from evomerge.fitness.samples import Samples, mean_metrics, restricted
from evomerge.journal import Journal
from evomerge.race import Course, Finish, Incumbent, Race
from evomerge.recipe import Recipe
from evomerge.records import Header, Outcome, SampleScores, Status, Trial
from evomerge.run_dir import RunDir
from evomerge.workers.base import Job

NUM = 200
OBJECTIVE = Objective(task="t", metric="acc", filter="none", weight=1, maximize=True)
OTHER = Objective(task="u", metric="acc", filter="none", weight=1, maximize=True)
HARMLESS = Constraint(task="safe", metric="acc", filter="none", maximize=True, kind="min", limit=0.5)


def model(rng: np.random.Generator, **levels: float) -> Samples:
    """A model that is right on a share of the documents of each task."""
    return {
        task: SampleScores(
            doc_ids=tuple(range(NUM)),
            values={"acc,none": tuple((rng.random(NUM) < level).astype(float).tolist())},
        )
        for task, level in levels.items()
    }


class Races:
    """Holds races over known scores."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def hold(
        self,
        models: Sequence[Samples],
        *,
        wanted: int = 3,
        objectives: Sequence[Objective] = (OBJECTIVE,),
        constraints: Sequence[Constraint] = (),
        incumbent: Incumbent | None = None,
        front: bool = False,
    ) -> dict[int, Finish]:
        self._count += 1
        run_dir = RunDir(self._folder / str(self._count))
        run_dir.create()
        documents = [DocumentSet(task=task, doc_ids=tuple(range(NUM)), name=task) for task in models[0]]
        course = Course(
            blocks=split_blocks(documents, (0.1, 0.2, 0.4, 0.7), {}, seed=0), error_rate=0.2, front=front
        )
        recipes = {
            number: Recipe.from_dict({"merge_method": "linear", "models": [{"model": f"model-{number}"}]})
            for number in range(len(models))
        }
        header = Header(experiment="", settings={}, inputs={}, versions={}, seed=0)
        with Journal.create(run_dir.journal, header) as journal:
            race = Race(course, objectives, constraints, run_dir, journal, lambda jobs: _scored(jobs, models))
            return race.score(recipes, wanted, incumbent)


def _scored(jobs: Sequence[Job], models: Sequence[Samples]) -> Iterator[tuple[int, Outcome]]:
    for job in jobs:
        wanted = {part.name: SampleScores(doc_ids=part.doc_ids, values={}) for part in job.documents}
        yield job.number, Outcome(status=Status.OK, samples=restricted(models[job.number], wanted))


def trials(finished: Mapping[int, Finish]) -> list[Trial]:
    return [
        Trial(
            number=number,
            candidate=str(number),
            genome=(),
            asked_after=0,
            status=done.outcome.status,
            fitness=done.fitness,
            violations=done.violations,
            out_after=done.out_after,
        )
        for number, done in sorted(finished.items())
    ]


def statuses(finished: Mapping[int, Finish]) -> str:
    """`.` for a candidate that reached the end, `o` for one that went out, `s` for one that was settled."""
    return "".join(
        "." if done.outcome.status is Status.OK else "o" if done.out_after else "s"
        for _, done in sorted(finished.items())
    )


@pytest.fixture
def races(tmp_path: Path) -> Races:
    return Races(tmp_path)


def test_the_worse_half_goes_out_and_the_clearly_second_are_settled(races: Races) -> None:
    rng = np.random.default_rng(0)
    finished = races.hold([model(rng, t=level) for level in (0.95, 0.7, 0.7, 0.2, 0.2, 0.2)])
    assert statuses(finished) == ".ssooo"
    assert finished[3].outcome.reason.startswith("out after ")
    assert finished[1].outcome.reason.startswith("settled after ")
    # Whoever stopped is estimated from its own documents and how the best did on the others.
    for number, level in enumerate((0.95, 0.7, 0.7, 0.2, 0.2, 0.2)):
        assert finished[number].fitness == pytest.approx(level, abs=0.2)


def test_who_holds_the_constraints_is_not_stopped_for_the_sake_of_who_does_not(races: Races) -> None:
    """The constraint is on a task of its own, which is raced over like the objective's."""
    rng = np.random.default_rng(1)
    models = [model(rng, t=0.9, safe=0.1) for _ in range(3)] + [model(rng, t=0.3, safe=0.9) for _ in range(3)]
    finished = races.hold(models, constraints=[HARMLESS])
    assert statuses(finished)[:3] == "ooo"
    assert "." in statuses(finished)[3:]
    assert "o" not in statuses(finished)[3:]
    values = told(trials(finished))
    assert all(holding > violating for holding in values[3:] for violating in values[:3])
    assert all(finished[number].violations for number in range(3))
    assert not any(finished[number].violations for number in range(3, 6))
    without = races.hold([{"t": each["t"]} for each in models])
    assert statuses(without)[3:] == "ooo"


def test_of_candidates_that_all_violate_those_go_on_that_violate_least(races: Races) -> None:
    rng = np.random.default_rng(2)
    models = [model(rng, t=0.9, safe=0.05) for _ in range(3)] + [
        model(rng, t=0.1, safe=0.4) for _ in range(3)
    ]
    finished = races.hold(models, constraints=[HARMLESS])
    assert statuses(finished)[:3] == "ooo"
    assert max(trials(finished), key=merit).number >= 3


def test_one_that_may_become_the_best_of_the_run_reaches_the_last_block(races: Races) -> None:
    stopped, counted, without_hope = [], [], []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        models = [model(rng, t=level) for level in rng.normal(0.6, 0.1, 8)]
        reached = [mean_metrics(each)["t"]["acc,none"] for each in models]
        close = races.hold(models, wanted=4, incumbent=incumbent(model(rng, t=0.65)))
        stopped.append(statuses(close)[int(np.argmax(reached))] != ".")
        counted.append(documents(close))
        # Against a run that is far ahead none of them can matter beyond being selected.
        without_hope.append(documents(races.hold(models, wanted=4, incumbent=incumbent(model(rng, t=0.99)))))
    assert np.mean(stopped) <= 0.2
    assert np.mean(without_hope) < 0.9 * np.mean(counted)


def incumbent(samples: Samples) -> Incumbent:
    return Incumbent(merit=(0.0, mean_metrics(samples)["t"]["acc,none"]), samples=samples)


def documents(finished: Mapping[int, Finish]) -> int:
    return sum(len(part.doc_ids) for done in finished.values() for part in done.outcome.samples.values())


def test_one_that_may_be_on_the_front_goes_on_where_that_is_asked_for(races: Races) -> None:
    """The last candidate is the worst by the mean and the only one that can do the second task."""
    rng = np.random.default_rng(4)
    models = [model(rng, t=0.9, u=0.5) for _ in range(5)] + [model(rng, t=0.1, u=0.8)]
    plain, kept = (races.hold(models, objectives=[OBJECTIVE, OTHER], front=front) for front in (False, True))
    assert statuses(plain)[-1] == "o"
    assert statuses(kept)[-1] == "."


def test_candidates_that_went_out_rank_by_the_block_they_reached(races: Races) -> None:
    rng = np.random.default_rng(5)
    finished = races.hold([model(rng, t=level) for level in (0.8, 0.8, 0.75, 0.6, 0.55, 0.1)])
    ranked = trials(finished)
    values = told(ranked)
    out = [trial for trial in ranked if trial.out_after]
    assert len({trial.out_after for trial in out}) > 1
    kept = min(v for v, trial in zip(values, ranked, strict=True) if not trial.out_after and v is not None)
    for trial in out:
        assert (values[trial.number] or 0.0) < kept
        for other in out:
            if other.out_after < trial.out_after:
                assert (values[other.number] or 0.0) < (values[trial.number] or 0.0)
