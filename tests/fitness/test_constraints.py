"""Constraints bind where they say, count relative to their bound, and are found wrong before a run starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from evomerge.errors import ConfigurationError, TaskError
from evomerge.experiment import ConstraintSettings
from evomerge.fitness.constraints import (
    Constraint,
    as_constraint,
    as_settings,
    judge,
    needs_sources,
    on_holdout,
    resolve_constraints,
    source_metrics,
    with_sources,
)
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.objectives import Objective
from evomerge.records import Final, Metrics, Status


def objective(task: str = "a", metric: str = "acc", **more: Any) -> Objective:
    settings: dict[str, Any] = {"filter": "none", "weight": 1, "maximize": True, **more}
    return Objective(task=task, metric=metric, **settings)


def constraint(
    kind: Literal["min", "max", "retention"],
    limit: float,
    *,
    task: str = "a",
    metric: str = "acc",
    maximize: bool = True,
    best: float | None = None,
) -> Constraint:
    return Constraint(
        task=task, metric=metric, filter="none", maximize=maximize, kind=kind, limit=limit, best=best
    )


def metrics(**values: float) -> Metrics:
    """`task_metric=value`."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        task, metric = name.split("_")
        found.setdefault(task, {})[f"{metric},none"] = value
    return found


@pytest.mark.parametrize(
    ("bound", "value", "expected"),
    [
        (constraint("min", 0.8), 0.8, 0.0),
        (constraint("min", 0.8), 0.6, 0.25),
        (constraint("max", 200.0), 199.0, 0.0),
        (constraint("max", 200.0), 300.0, 0.5),
        (constraint("min", -0.5), -0.75, 0.5),
        (constraint("min", 0.0), -0.25, 0.25),
        (constraint("retention", 0.95, best=0.8), 0.76, 0.0),
        (constraint("retention", 0.95, best=0.8), 0.38, 0.5),
        (constraint("retention", 1.05, best=0.8), 0.42, 0.5),
        (constraint("retention", 0.9, best=-1.0), -1.1, 0.0),
        (constraint("retention", 0.9, best=-1.0), -1.65, 0.5),
        (constraint("retention", 0.9, best=200.0, maximize=False), 220.0, 0.0),
        (constraint("retention", 0.9, best=200.0, maximize=False), 330.0, 0.5),
        (constraint("retention", 0.9, best=0.0), 0.0, 0.0),
    ],
)
def test_a_violation_is_the_excess_relative_to_the_bound(
    bound: Constraint, value: float, expected: float
) -> None:
    assert bound.violation(value) == pytest.approx(expected)


def test_rounding_is_no_violation() -> None:
    """0.1 + 0.2 is more than 0.3."""
    assert constraint("max", 0.3).violation(0.1 + 0.2) == 0
    assert constraint("max", 0.3).violation(0.3001) > 0


def test_a_judgement_names_what_is_violated_and_keeps_the_fitness() -> None:
    bounds = [constraint("min", 0.8), constraint("max", 0.5, task="b", metric="loss"), constraint("max", 0.9)]
    found = judge(metrics(a_acc=0.6, b_loss=0.25), [objective()], bounds)
    assert found.fitness == 0.6
    assert found.violations == {"a acc >= 0.8": pytest.approx(0.25)}
    assert judge(metrics(a_acc=0.85, b_loss=0.25), [objective()], bounds).violations == {}


def test_retention_is_measured_at_the_best_source_in_the_direction_of_the_metric() -> None:
    bounds = [
        constraint("retention", 0.5),
        constraint("retention", 0.5, task="b", metric="loss", maximize=False),
        constraint("min", 0.1),
    ]
    sources = [metrics(a_acc=0.2, b_loss=4.0), metrics(a_acc=0.6, b_loss=2.0), {}]
    assert needs_sources([objective()], bounds)
    assert not needs_sources([objective()], bounds[2:])
    _, told = with_sources([objective()], bounds, sources)
    assert [item.best for item in told] == [0.6, 2.0, None]
    found = judge(metrics(a_acc=0.15, b_loss=6.0), [objective()], told)
    assert found.violations == {
        "a acc retains 0.5 of the best source": pytest.approx(0.5),
        "b loss retains 0.5 of the best source": pytest.approx(1.0),
    }


def test_shares_of_the_best_source_weigh_tasks_alike() -> None:
    wanted = [
        objective(normalize=True),
        objective("b", "loss", maximize=False, normalize=True, weight=3),
        objective("c", "likelihood", normalize=True),
    ]
    sources = [
        metrics(a_acc=0.5, b_loss=4.0, c_likelihood=-2.0),
        metrics(a_acc=0.4, b_loss=5.0, c_likelihood=-1.0),
    ]
    told, _ = with_sources(wanted, (), sources)
    assert [item.reference for item in told] == [0.5, 4.0, -1.0]
    assert judge(sources[0], told).fitness == pytest.approx((1 + 3 * 1 + 0) / 5)
    # Half of the best accuracy, a loss larger by half of the best, a log-likelihood lower by a half of the best.
    merged = metrics(a_acc=0.25, b_loss=6.0, c_likelihood=-1.5)
    assert judge(merged, told).fitness == pytest.approx((0.5 + 3 * 0.5 + 0.5) / 5)
    raw = [objective(), objective("c", "likelihood")]
    assert with_sources(raw, (), [])[0] == tuple(raw)


def test_shares_of_nothing_are_refused_by_name() -> None:
    wanted = [objective("b"), objective(normalize=True)]
    with pytest.raises(ConfigurationError, match=r"objectives\.1\.normalize: .* reaches 0 in a acc"):
        with_sources(wanted, (), [metrics(a_acc=0.0, b_acc=1.0)])
    with pytest.raises(ConfigurationError, match=r"models: no source model could be scored"):
        with_sources(wanted, (), [{}])
    with pytest.raises(AssertionError, match="have not been scored"):
        judge(metrics(a_acc=0.5, b_acc=1.0), wanted)


def final(name: str, stage: Any, value: float, *, recipe: Any = None) -> Final:
    status = Status.OK
    return Final(
        name=name, stage=stage, candidate="", recipe=recipe, status=status, metrics=metrics(a_acc=value)
    )


def test_sources_are_known_from_their_search_scores_and_judge_the_holdout_by_their_holdout_scores() -> None:
    finals = [
        final("one", "search", 0.5),
        final("two", "search", 0.75),
        final("task arithmetic 1", "search", 0.9, recipe={}),
        final("one", "holdout", 0.25),
        final("two", "holdout", 0.5),
        final("winner of stage first", "holdout", 0.9),
        final("winner", "holdout", 0.8, recipe={}),
    ]
    assert source_metrics(finals) == [metrics(a_acc=0.5), metrics(a_acc=0.75)]
    bounds = [constraint("retention", 0.9), constraint("min", 0.1), constraint("min", 0.1, task="c")]
    assert on_holdout(bounds, finals) == [replace(bounds[0], best=0.5), *bounds[1:]]
    assert on_holdout(bounds, finals[:3]) == bounds[1:]
    assert judge(metrics(a_acc=0.5), [objective()], on_holdout(bounds, finals)).violations == {}


# What an experiment says


@pytest.fixture(scope="module")
def library(tasks: Path) -> TaskLibrary:
    return TaskLibrary(["gen", "choose"], [tasks], allow_code=False)


OBJECTIVES = (
    Objective(task="gen", metric="exact_match", filter="whole", weight=1, maximize=False),
    Objective(task="choose", metric="acc", filter="none", weight=1, maximize=True),
)


def resolved(library: TaskLibrary, *entries: dict[str, Any]) -> tuple[Constraint, ...]:
    settings = [ConstraintSettings.model_validate(entry) for entry in entries]
    return resolve_constraints(settings, OBJECTIVES, library.measure)


@pytest.mark.parametrize(
    ("entry", "labels"),
    [
        (
            {"task": "choose", "metric": "acc", "min": 0.2, "max": 0.9},
            ["choose acc >= 0.2", "choose acc <= 0.9"],
        ),
        ({"metric": "output_tokens", "max": 300}, ["gen output_tokens <= 300"]),
        (
            {"metric": "likelihood", "retention": 0.5},
            [f"{task} likelihood retains 0.5 of the best source" for task in ("gen", "choose")],
        ),
        (
            {"retention": 0.95},
            [f"{item.label} retains 0.95 of the best source" for item in OBJECTIVES],
        ),
    ],
)
def test_an_entry_stands_for_a_bound_of_every_measure_it_names(
    library: TaskLibrary, entry: dict[str, Any], labels: list[str]
) -> None:
    found = resolved(library, entry)
    assert [item.label for item in found] == labels
    # A resumed run reads them back, one entry each.
    again = [as_settings(item) for item in found]
    assert resolve_constraints(again, OBJECTIVES, library.measure) == found
    assert [as_constraint(item) for item in again] == list(found)


def test_a_constraint_has_the_direction_of_the_objective_it_is_about(library: TaskLibrary) -> None:
    for entry in ({"retention": 0.9}, {"task": "gen", "metric": "exact_match", "retention": 0.9}):
        assert not resolved(library, entry)[0].maximize
    (own,) = resolved(library, {"task": "gen", "metric": "exact_match", "filter": "first", "retention": 0.9})
    assert own.maximize


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "gen", "metric": "acc", "min": 0.5}, r"constraints\.1\.metric: the task gen has no metric"),
        ({"metric": "accc", "min": 0.5}, r"constraints\.1\.metric: .*did you mean 'acc'"),
        ({"task": "gen", "metric": "exact_match", "filter": "all", "min": 0}, r"constraints\.1\.filter: "),
        ({"task": "choose", "metric": "output_tokens", "max": 9}, r"constraints\.1\.metric: .*generates no"),
        (
            {"task": "choose", "metric": "acc", "max": 0.1},
            r"constraints\.1: choose acc <= 0.1 and, in constraints\.0, choose acc >= 0.2: nothing can hold",
        ),
    ],
)
def test_what_tasks_cannot_hold_is_named(library: TaskLibrary, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        resolved(library, {"task": "choose", "metric": "acc", "min": 0.2}, entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "gen", "metric": "acc"}, "expected min, max or retention"),
        ({"task": "gen", "retention": 0.9}, "metric: missing; task is about a metric"),
        ({"max": 0.9}, "metric: missing; max is about a metric"),
        ({"task": "gen", "metric": "acc", "min": 0.9, "max": 0.5}, "min: 0.9 is above max, 0.5"),
        ({"task": "gen", "metric": "acc", "min": float("nan")}, "finite"),
        ({"retention": 0}, "greater than 0"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConstraintSettings.model_validate(entry)
