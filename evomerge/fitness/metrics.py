"""What a task can be scored by: its own metrics, and two that evomerge adds.

- `likelihood`: how probable the model finds the reference answers; see `fitness.likelihood`.
- `output_tokens`: the length of what the model says, in tokens of its tokenizer, up to the text that ends it.

Both are numbers per document like any other metric. lm-eval does not know them, so its command cannot show them.
So are the user's own functions and judges, see `fitness.own`.
Where a task has a metric of the same name itself, naming its filter chooses that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.errors import Fault, TaskError, nearest
from evomerge.experiment import ConstraintSettings, ObjectiveSettings
from evomerge.fitness.judge import check_prompt
from evomerge.fitness.likelihood import check_references
from evomerge.fitness.objectives import BUILT_IN, Measure, Objective
from evomerge.measure_settings import FunctionSettings, JudgeSettings

LIKELIHOOD = ("likelihood", BUILT_IN)
OUTPUT_TOKENS = ("output_tokens", BUILT_IN)


def measure(name: str, task: Any, settings: ObjectiveSettings | ConstraintSettings, where: str) -> Measure:
    """Look up the metric that an entry of the experiment asks of a task, and fill in what it left open.

    Args:
        name: The task's name.
        task: lm-eval's task.
        settings: The entry.
        where: Where it stands in the experiment, such as `objectives.0`.

    Raises:
        TaskError: The task has no such metric or filter, or the metric is no number per document.
    """
    metric = settings.measured
    assert metric is not None
    if settings.own is not None:
        _check_users_own(name, task, settings, where)
        return Measure(
            task=name,
            metric=metric,
            filter=BUILT_IN,
            maximize=settings.direction != "minimize",
            own=settings.own,
        )
    if metric in (LIKELIHOOD[0], OUTPUT_TOKENS[0]) and settings.filter in (None, BUILT_IN):
        larger = _check_built_in(name, task, metric, f"{where}.metric")
        its_filter = BUILT_IN
    else:
        its_filter = _check_own(name, task, metric, settings.filter, where)
        larger = bool(task.higher_is_better()[metric])
    return Measure(
        task=name,
        metric=metric,
        filter=its_filter,
        maximize=larger if settings.direction is None else settings.direction == "maximize",
    )


def _check_users_own(
    name: str, task: Any, settings: ObjectiveSettings | ConstraintSettings, where: str
) -> None:
    """Make sure that a task has what a function or judge of the user's is about."""
    field = "fitness" if isinstance(settings.own, FunctionSettings) else "judge"
    if settings.filter not in (None, BUILT_IN):
        reason = f"{field} is about what the model says, as it says it, not about a filter; remove it"
        raise TaskError(Fault(path=f"{where}.filter", reason=reason))
    if settings.given != "model" and getattr(task, "OUTPUT_TYPE", None) != "generate_until":
        reason = f"{name} generates no text, so there is nothing to look at"
        reason += "; a function may be given the model instead (given: model)" if field == "fitness" else ""
        raise TaskError(Fault(path=f"{where}.{field}", reason=reason))
    if isinstance(settings.own, JudgeSettings):
        check_prompt(name, task, settings.own, f"{where}.judge.prompt")


def _check_built_in(name: str, task: Any, metric: str, where: str) -> bool:
    """Whether larger is better."""
    if metric == LIKELIHOOD[0]:
        check_references(name, task, where)
        return True
    if getattr(task, "OUTPUT_TYPE", None) != "generate_until":
        raise TaskError(Fault(path=where, reason=f"{name} generates no text, so there is no length of it"))
    return False


def _check_own(name: str, task: Any, metric: str, wanted: str | None, where: str) -> str:
    """The filter to read a metric of the task's own from."""
    metrics = list(task.aggregation())
    filters = [str(pipeline.name) for pipeline in task._filters]
    if metric not in metrics:
        known = [*metrics, LIKELIHOOD[0], OUTPUT_TOKENS[0]]
        reason = (
            f"the task {name} has no metric {metric!r}{nearest(metric, known)}; it has {', '.join(metrics)}"
        )
        reason += f" and what every task may have, {LIKELIHOOD[0]} and {OUTPUT_TOKENS[0]}"
        raise TaskError(Fault(path=f"{where}.metric", reason=reason))
    if wanted is not None and wanted not in filters:
        reason = f"the task {name} has no filter {wanted!r}"
        reason += f"{nearest(wanted, filters)}; it has {', '.join(filters)}"
        raise TaskError(Fault(path=f"{where}.filter", reason=reason))
    means = mean_metrics(task)
    if metric not in means:
        reason = f"{metric} is not the mean of a number per document, which comparing models needs; "
        reason += f"{name} has {', '.join(means) or 'no metric that is'}"
        raise TaskError(Fault(path=f"{where}.metric", reason=reason))
    return wanted or filters[0]


def mean_metrics(task: Any) -> list[str]:
    """The task's own metrics that are the mean of a number per document."""
    return [metric for metric, aggregation in task.aggregation().items() if _is_mean(aggregation)]


def _is_mean(aggregation: Callable[[Sequence[float]], float]) -> bool:
    """Whether an aggregation is the mean, by what it does to an example."""
    try:
        return math.isclose(aggregation([0.25, 0.5, 2.25]), 1.0)
    except Exception:  # it expects pairs, or texts
        return False


def judged(
    task: Any, documents: Sequence[tuple[Any, Sequence[Any]]], wanted: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[float]]:
    """What the task's own filters and metrics say of the answers.

    Args:
        task: The task.
        documents: Every document with its answered instances, in the order of their `idx`.
        wanted: The (metric, filter) pairs.

    Raises:
        TaskError: A metric does not give one number per document.
    """
    names = list(dict.fromkeys(name for _, name in wanted))
    if names:
        for pipeline in task._filters:
            pipeline.apply([instance for _, instances in documents for instance in instances])
    columns: dict[tuple[str, str], list[float]] = {pair: [] for pair in wanted}
    for name in names:
        for document, instances in documents:
            found = task.process_results(document, [item.filtered_resps[name] for item in instances])
            for metric, its_filter in wanted:
                if its_filter == name:
                    columns[metric, name].append(_number(found, metric, task.config.task))
    return columns


def _number(found: Mapping[str, Any], metric: str, task: str) -> float:
    value = found.get(metric)
    if isinstance(value, (list, tuple, dict, str)) or value is None:
        reason = f"does not give one number per document (got {type(value).__name__}); choose another metric"
        raise TaskError(Fault(path=f"{task}: {metric}", reason=reason))
    return float(value)


def aggregated(task: Any, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The task's metrics from the scores of its documents, both by `metric,filter`."""
    own = task.aggregation()
    found = {}
    for key, column in values.items():
        metric, _, name = key.rpartition(",")
        found[key] = math.fsum(column) / len(column) if name == BUILT_IN else float(own[metric](list(column)))
    return found


def has_stock_metric(task: str, objectives: Sequence[Objective]) -> bool:
    """Whether the stock `lm_eval` command shows anything that a task is optimised by."""
    return any(item.task == task and item.filter != BUILT_IN for item in objectives)
