"""What an experiment or a recipe will take, said before anything is started; no weights are read.

file ─► prepare, or load_recipe ─► sizes, tokens ─┬─► ExperimentPlan or RecipePlan ─► text.py, JSON
                                    machine.py ───┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigurationError
from evomerge.merge.load import load_recipe
from evomerge.plan.experiment import plan_experiment
from evomerge.plan.machine import Load, measure
from evomerge.plan.recipe import plan_recipe
from evomerge.plan.recipe_records import RecipePlan
from evomerge.plan.records import ExperimentPlan, Machine
from evomerge.prepare import prepare
from evomerge.report.validate import kind_of

__all__ = ["ExperimentPlan", "RecipePlan", "as_dict", "plan_file"]


def plan_file(
    file: Path,
    *,
    overrides: Sequence[str] = (),
    allow_task_code: bool = False,
    allow_code: bool = False,
    measured: Callable[[Load], Machine] = measure,
) -> ExperimentPlan | RecipePlan:
    """Plan what a file describes.

    Args:
        file: An experiment or a recipe.
        overrides: `path=value` texts that change an experiment.
        allow_task_code: Whether task files outside lm-eval may run Python code.
        allow_code: Whether they may, and a run might run functions of the user's; here none is run.
        measured: Measures the machine.

    Raises:
        ConfigurationError: Carries every fault found, as `validate_file` does; or the file is of another kind.
    """
    kind = kind_of(file)
    if kind == "experiment":
        prepared = prepare(file, overrides=overrides, allow_task_code=allow_task_code, allow_code=allow_code)
        return plan_experiment(prepared, measured=measured)
    if overrides:
        raise ConfigurationError(f"--set {overrides[0]}: changes values of experiments; {file} is a {kind}")
    if kind != "recipe":
        raise ConfigurationError(
            f"{file}: a {kind}; expected an experiment or a single recipe, whose models are all there"
        )
    return plan_recipe(load_recipe(file), measured=measured)


def as_dict(plan: ExperimentPlan | RecipePlan) -> dict[str, Any]:
    """The plan as plain values."""
    return asdict(plan)
