"""Rough times from a short measurement, by a simple model.

A batch of B prompts of n tokens takes 2 P B n operations at the measured speed, and each token that is then
generated for all of them 2 P B; P counts the parameters that are multiplied. Every pass through L layers takes
in addition the time of `CALLS_PER_LAYER` (L + 2) small operations, and lm-eval's own work for every prompt and
new token that of some more, which is all that matters for tiny models. The attention between tokens is left out,
and in mixtures of experts every expert counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evomerge.plan.header_bank import Statistic
from evomerge.plan.records import Machine, Span
from evomerge.plan.tokens import TaskLoad

CALLS_PER_LAYER = 60
"""Small operations of transformers' layers, in calls as `Machine.call_seconds` measures them."""

CALLS_PER_REQUEST = 40
CALLS_PER_TOKEN = 10
"""The same of lm-eval's tokenizing, stopping and judging, for every prompt and every token after it."""

SLOWDOWN = Span(low=1.0, high=2.5)
"""How much longer real models take than the model of this module says."""

MERGE_SLOWDOWN = Span(low=1.0, high=5.0)
"""How much longer a merge takes than copying what it reads and writes."""

STATISTICS_SECONDS = {"histogram": 4e-9, "gram": 4e-9, "ranks": 1.4e-7}
"""Time per element of computing what is kept of the sources; one processor core, as one worker computes it."""

VIEW_SECONDS = Span(low=0.02, high=0.2)
"""Time to put layers in another order."""

RAY_SECONDS = Span(low=10.0, high=30.0)
"""Time to start Ray and a worker, the models apart."""

INLINE_SECONDS = Span(low=2.0, high=10.0)
"""Time to start a worker in this process, the models apart."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a candidate is to a worker.

    Attributes:
        parameters: Parameters that are multiplied.
        layers: Number of its layers.
        merged_bytes: Bytes read and written to make it; None for a path, which copies nothing.
    """

    parameters: float
    layers: float
    merged_bytes: float | None


def statistics_seconds(asked: Iterable[Statistic]) -> float:
    """Time to compute statistics of the sources."""
    return sum(STATISTICS_SECONDS[each.kind] * each.elements for each in asked)


def scoring_seconds(work: Work, load: TaskLoad, machine: Machine) -> Span:
    """Time to score a model."""
    calls = CALLS_PER_LAYER * (work.layers + 2) * machine.call_seconds
    low = high = 0.0
    for batch in load.batches:
        operations = 2 * work.parameters * batch.rows
        own = batch.rows * machine.call_seconds
        prompt = operations * batch.length / machine.prompt_flops + calls + CALLS_PER_REQUEST * own
        step = operations / machine.decode_flops + calls + CALLS_PER_TOKEN * own
        low += prompt + batch.new.low * step
        high += prompt + batch.new.high * step
    return Span(low=low * SLOWDOWN.low, high=high * SLOWDOWN.high)


def candidate_seconds(work: Work, load: TaskLoad, machine: Machine) -> Span:
    """Time to make a candidate and to score it."""
    made = VIEW_SECONDS
    if work.merged_bytes is not None:
        made = MERGE_SLOWDOWN * (work.merged_bytes / machine.bytes_per_second)
    return made + scoring_seconds(work, load, machine)


def search_seconds(candidate: Span, *, evaluations: int, population: int, workers: int) -> Span:
    """Time of a search, whose workers wait for each other at the end of each generation."""
    whole, rest = divmod(evaluations, population)
    rounds = whole * math.ceil(population / workers) + math.ceil(rest / workers)
    return candidate * rounds


def total(spans: Sequence[Span]) -> Span:
    """The sum."""
    return sum(spans, start=Span(low=0.0, high=0.0))
