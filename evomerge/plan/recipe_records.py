"""What the plan of a recipe says, as frozen records; `evomerge plan --json` prints the same.

Sizes are in bytes, times in seconds. docs/plan.md describes every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.plan.records import Machine, ModelEntry, Span


@dataclass(frozen=True, kw_only=True)
class ResultEntry:
    """The checkpoint that a recipe gives.

    Attributes:
        parameters: Number of its parameters.
        dtype: Type they are written in; the most frequent of several.
        bytes: Size of its weight files.
        layers: Number of its layers, those of its language model if it has several modules.
        modules: Its modules -> number of their layers; the only one is called `default`.
        tensors: Number of its tensors.
        shards: Number of its weight files.
    """

    parameters: int
    dtype: str
    bytes: int
    layers: int
    modules: Mapping[str, int]
    tensors: int
    shards: int


@dataclass(frozen=True, kw_only=True)
class MergeMemory:
    """Weights in memory at once during `evomerge merge`.

    Attributes:
        process: Python, torch and the other libraries, which come on top.
        default: Without `--memory-budget`.
        smallest_budget: The smallest `--memory-budget` that this recipe can be merged with.
        available: Main memory that is free.
    """

    process: int
    default: int
    smallest_budget: int
    available: int


@dataclass(frozen=True, kw_only=True)
class MergeDisk:
    """Disk of `evomerge merge`.

    Attributes:
        read: Bytes of the source models that are read.
        written: Bytes of the weight files.
        available: What is free in the working directory.
    """

    read: int
    written: int
    available: int


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """What merging a recipe will take."""

    kind: str = "recipe"
    method: str
    models: tuple[ModelEntry, ...]
    result: ResultEntry
    memory: MergeMemory
    disk: MergeDisk
    seconds: Span
    machine: Machine
    warnings: tuple[str, ...]
