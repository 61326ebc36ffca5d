"""evomerge: evolutionary search for the best way to merge language models.

The functions and records behind the command line. Importing the package loads neither torch nor ray; each
name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.checkpoints.reader import Checkpoint
    from evomerge.errors import EvomergeError
    from evomerge.merge.export import export_model
    from evomerge.plan import ExperimentPlan, RecipePlan, plan_file
    from evomerge.prepare import prepare
    from evomerge.recipe import Recipe
    from evomerge.records import Dimension, Outcome, Status, Trial
    from evomerge.run import RunResult, resume_run, start_run

_HOMES = {
    "Checkpoint": "evomerge.checkpoints.reader",
    "Dimension": "evomerge.records",
    "EvomergeError": "evomerge.errors",
    "ExperimentPlan": "evomerge.plan",
    "Outcome": "evomerge.records",
    "Recipe": "evomerge.recipe",
    "RecipePlan": "evomerge.plan",
    "RunResult": "evomerge.run",
    "Status": "evomerge.records",
    "Trial": "evomerge.records",
    "export_model": "evomerge.merge.export",
    "plan_file": "evomerge.plan",
    "prepare": "evomerge.prepare",
    "resume_run": "evomerge.run",
    "start_run": "evomerge.run",
}

__all__ = [
    "Checkpoint",
    "Dimension",
    "EvomergeError",
    "ExperimentPlan",
    "Outcome",
    "Recipe",
    "RecipePlan",
    "RunResult",
    "Status",
    "Trial",
    "export_model",
    "plan_file",
    "prepare",
    "resume_run",
    "start_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
