"""What a candidate must hold to win, beside being fit.

A constraint bounds one measure: from below (`min`), from above (`max`), or by what the source models reach
(`retention`). How much it is violated counts relative to its bound, so that constraints on different measures
add up. `fitness.ranking` ranks candidates by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from evomerge.errors import ConfigurationError, Fault, TaskError
from evomerge.experiment import ConstraintSettings
from evomerge.fitness.metrics import LIKELIHOOD
from evomerge.fitness.objectives import Measure, Number, Objective, fitness
from evomerge.measure_settings import FunctionSettings
from evomerge.records import Final, Metrics

LookUp = Callable[[str, ConstraintSettings, str], Measure]
"""Finds the metric of a task that an entry asks for; `harness.TaskLibrary.measure`."""

TOLERANCE = 1e-12
"""Share of a bound that the rounding of float64 may miss it by."""


@dataclass(frozen=True, kw_only=True)
class Constraint(Measure):
    """One bound on one measure.

    Attributes:
        kind: What bounds it.
        limit: The bound, or for `retention` the share of what the best source model reaches.
        best: What the best source model reaches; needed, and known, only for `retention`.
    """

    kind: Literal["min", "max", "retention"]
    limit: float
    best: float | None = None

    @property
    def label(self) -> str:
        """Name for tables and messages."""
        if self.kind == "retention":
            return f"{super().label} retains {self.limit:.4g} of the best source"
        return f"{super().label} {'>=' if self.kind == 'min' else '<='} {self.limit:.6g}"

    @property
    def bound(self) -> tuple[float, bool]:
        """The bound, and whether it is a lower one."""
        if self.kind != "retention":
            return self.limit, self.kind == "min"
        assert self.best is not None, f"{self.label}: the source models have not been scored"
        loss = (1 - self.limit) * abs(self.best)
        return (self.best - loss, True) if self.maximize else (self.best + loss, False)

    def violation(self, value: Number) -> Number:
        """How far values lie beyond the bound, relative to it; beyond a bound of 0, how far. 0 where it holds."""
        bound, is_lower = self.bound
        excess = bound - value if is_lower else value - bound
        return (excess > TOLERANCE * max(1.0, abs(bound))) * excess / (abs(bound) or 1.0)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a model's metrics are worth.

    Attributes:
        fitness: The weighted mean of its objectives.
        violations: Label of every constraint it violates -> by how much, relative to the bound.
    """

    fitness: float
    violations: Mapping[str, float] = field(default_factory=dict)


def judge(
    metrics: Metrics, objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> Judgement:
    """Judge a model by its metrics; those that need it must know the sources, see `with_sources`."""
    return Judgement(fitness=fitness(metrics, objectives), violations=violations(metrics, constraints))


def violations(metrics: Metrics, constraints: Sequence[Constraint]) -> dict[str, float]:
    """Label of every violated constraint -> by how much; constraints on tasks without metrics are left out."""
    found = {item.label: item.violation(item.of(metrics)) for item in constraints if item.task in metrics}
    return {label: violation for label, violation in found.items() if violation > 0}


def needs_sources(objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> bool:
    """Whether judging needs the scores of the source models."""
    return any(item.normalize for item in objectives) or any(item.kind == "retention" for item in constraints)


def with_sources(
    objectives: Sequence[Objective], constraints: Sequence[Constraint], sources: Sequence[Metrics]
) -> tuple[tuple[Objective, ...], tuple[Constraint, ...]]:
    """Tell objectives and constraints what the best source model reaches, where they need it.

    Args:
        objectives: The objectives.
        constraints: The constraints.
        sources: Metrics of the source models, on the documents that are judged by; empty ones, of models that
            could not be scored, are passed over.

    Raises:
        ConfigurationError: No source model could be scored, or none reaches anything on an objective.
    """
    if not needs_sources(objectives, constraints):
        return tuple(objectives), tuple(constraints)
    scored = [metrics for metrics in sources if metrics]
    if not scored:
        reason = (
            "no source model could be scored, so there is nothing that normalize and retention could refer to"
        )
        raise ConfigurationError(Fault(path="models", reason=reason))
    told: list[Objective] = []
    faults: list[Fault] = []
    for position, item in enumerate(objectives):
        best = item.best_of(scored) if item.normalize else None
        if best is not None and abs(best) <= TOLERANCE:
            reason = f"the best source model reaches 0 in {item.label}, which has no shares; remove normalize"
            faults.append(Fault(path=f"objectives.{position}.normalize", reason=reason))
        told.append(replace(item, reference=best))
    if faults:
        raise ConfigurationError(faults)
    return tuple(told), tuple(
        replace(item, best=item.best_of(scored)) if item.kind == "retention" else item for item in constraints
    )


def source_metrics(finals: Sequence[Final], stage: Literal["search", "holdout"] = "search") -> list[Metrics]:
    """Metrics of the source models and the base, which are scored on the search documents as they are.

    Args:
        finals: The evaluations beside a search.
        stage: Which documents the metrics are of.
    """
    names = {final.name for final in finals if final.stage == "search" and final.recipe is None}
    return [
        final.metrics
        for final in finals
        if final.name in names and final.stage == stage and final.recipe is None and final.metrics
    ]


def on_holdout(constraints: Sequence[Constraint], finals: Sequence[Final]) -> list[Constraint]:
    """The constraints as they bind on the holdout: retention by what the sources reach there."""
    sources = source_metrics(finals, "holdout")
    found = []
    for item in constraints:
        scored = [metrics for metrics in sources if item.task in metrics]
        if item.kind == "retention" and scored:
            found.append(replace(item, best=item.best_of(scored)))
        elif item.kind != "retention":
            found.append(item)
    return found


def resolve_constraints(
    settings: Sequence[ConstraintSettings], objectives: Sequence[Objective], look_up: LookUp
) -> tuple[Constraint, ...]:
    """Turn the entries of an experiment into constraints, one for every bound of every measure.

    Args:
        settings: The entries.
        objectives: The objectives, which entries without a task or a metric are about.
        look_up: Finds the metric of a task.

    Raises:
        TaskError: Carries every fault: an unknown metric, bounds that exclude each other.
    """
    found: dict[Constraint, str] = {}
    faults: list[Fault] = []
    for position, entry in enumerate(settings):
        where = f"constraints.{position}"
        try:
            for item in _measures(entry, objectives, look_up, where):
                for constraint in _bounds(item, entry):
                    found.setdefault(constraint, where)
        except TaskError as error:
            faults += error.faults
    faults += _contradictions(found)
    if faults:
        raise TaskError(faults)
    return tuple(found)


def as_settings(constraint: Constraint) -> ConstraintSettings:
    """The entry of an experiment that stands for this constraint alone."""
    return ConstraintSettings.model_validate(
        {
            "task": constraint.task,
            **_measured(constraint),
            "filter": constraint.filter,
            "direction": "maximize" if constraint.maximize else "minimize",
            constraint.kind: constraint.limit,
        }
    )


def _measured(item: Measure) -> dict[str, object]:
    """What an entry of an experiment calls a measure."""
    if isinstance(item.own, FunctionSettings):
        return {"fitness": item.own.name, "given": item.own.given}
    return {"metric": item.metric} if item.own is None else {"judge": item.own}


def as_constraint(settings: ConstraintSettings) -> Constraint:
    """The constraint that such an entry stands for."""
    assert settings.task is not None
    assert settings.measured is not None
    assert settings.filter is not None
    item = Measure(
        task=settings.task,
        metric=settings.measured,
        filter=settings.filter,
        maximize=settings.direction == "maximize",
        own=settings.own,
    )
    return next(_bounds(item, settings))


def _measures(
    entry: ConstraintSettings, objectives: Sequence[Objective], look_up: LookUp, where: str
) -> Iterator[Measure]:
    if entry.measured is None:
        yield from objectives
        return
    tasks = [entry.task] if entry.task is not None else dict.fromkeys(item.task for item in objectives)
    found: list[Measure] = []
    faults: list[Fault] = []
    for task in tasks:
        try:
            found.append(_of_objective(entry, task, objectives) or look_up(task, entry, where))
        except TaskError as error:
            faults += error.faults
    # Tasks differ in their metrics, but a task that cannot have a likelihood has a document to repair.
    if faults and (not found or entry.metric == LIKELIHOOD[0] or entry.own is not None):
        raise TaskError(faults)
    for item in found:
        same = [other for other in objectives if (other.task, other.key) == (item.task, item.key)]
        yield same[0] if same and entry.direction is None else item


def _of_objective(entry: ConstraintSettings, task: str, objectives: Sequence[Objective]) -> Measure | None:
    """The function or judge of an objective that an entry names as its metric."""
    for item in objectives:
        if item.own is not None and (item.task, item.metric) == (task, entry.metric):
            return item if entry.direction is None else replace(item, maximize=entry.direction == "maximize")
    return None


def _bounds(item: Measure, entry: ConstraintSettings) -> Iterator[Constraint]:
    limits: dict[Literal["min", "max", "retention"], float | None] = {
        "min": entry.min,
        "max": entry.max,
        "retention": entry.retention,
    }
    for kind, limit in limits.items():
        if limit is not None:
            yield Constraint(
                task=item.task,
                metric=item.metric,
                filter=item.filter,
                maximize=item.maximize,
                own=item.own,
                kind=kind,
                limit=limit,
            )


def _contradictions(found: Mapping[Constraint, str]) -> Iterator[Fault]:
    """Smallest and largest values of one measure, from different entries, that nothing lies between."""
    for lower, its_place in found.items():
        for upper, place in found.items():
            same = (lower.task, lower.key) == (upper.task, upper.key)
            if same and (lower.kind, upper.kind) == ("min", "max") and lower.limit > upper.limit:
                yield Fault(
                    path=place,
                    reason=f"{upper.label} and, in {its_place}, {lower.label}: nothing can hold both",
                )
