"""The table of merge methods. A new method touches its own file, one line here, its test and its doc."""

from __future__ import annotations

from evomerge.merge.methods import (
    dare_linear,
    dare_ties,
    linear,
    passthrough,
    slerp,
    task_arithmetic,
    ties,
)
from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

METHODS: dict[str, Method] = {
    "linear": linear.METHOD,
    "slerp": slerp.METHOD,
    "task_arithmetic": task_arithmetic.METHOD,
    "ties": ties.METHOD,
    "dare_linear": dare_linear.METHOD,
    "dare_ties": dare_ties.METHOD,
    "passthrough": passthrough.METHOD,
}

__all__ = ["METHODS", "BasePolicy", "MergeInputs", "Method", "Parameter", "Scope"]
