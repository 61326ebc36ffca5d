"""Run directories of searches over paths, written without searching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.experiment import Experiment
from evomerge.journal import Journal
from evomerge.prepare import settings_of
from evomerge.records import Header, Status, Trial
from evomerge.run_dir import RunDir

DATA_FLOW = {"type": "data_flow", "genome": {"type": "indicator", "repeats": 1}, "scales": "none"}
SCALED = {**DATA_FLOW, "scales": {"type": "hop", "low": 0.5, "high": 2.0}}
PARAMETER = {
    "type": "parameter",
    "merge_method": "linear",
    "parameters": {"weight": {"low": 0.0, "high": 1.0}},
}

STAGES = [
    {"name": "weights", "search_space": PARAMETER, "search": {"evaluations": 1}},
    {"name": "order", "search_space": DATA_FLOW, "search": {"evaluations": 2}},
]
"""The second has the winner of the first as its first source model."""

SLOTS = ("one.1", "one.2", "two.0", "two.1", "two.2", "two.3")
"""The slots of `DATA_FLOW` over the models `one` and `two` of the tiny zoo, in the genome's order."""


def genome(*kept: str) -> tuple[float, ...]:
    """The genome of `DATA_FLOW` whose path keeps these slots, besides the first and last layer of `one`."""
    return tuple(0.5 if slot in kept else -0.5 for slot in SLOTS)


def trial(
    number: int, genome: Sequence[float], *, fitness: float | None = 0.5, asked_after: int = 0
) -> Trial:
    """A recorded trial."""
    return Trial(
        number=number,
        candidate="c",
        genome=tuple(genome),
        asked_after=asked_after,
        status=Status.INVALID if fitness is None else Status.OK,
        fitness=fitness,
        standard_error=None if fitness is None else 0.05,
    )


def make_run(folder: Path, zoo: Path, trials: Sequence[Trial], **settings: Any) -> Path:
    """Write a run over `one` and `two` of the tiny zoo, by default of a search over `DATA_FLOW`."""
    searches = {"search_space": DATA_FLOW, "search": {"evaluations": 100}}
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "models": [str(zoo / "one"), str(zoo / "two")],
            "objectives": [{"task": "t", "metric": "m"}],
            **({} if "stages" in settings else searches),
            **settings,
        }
    )
    found = RunDir(folder)
    found.create()
    header = Header(experiment="e", settings=settings_of(experiment), inputs={}, versions={}, seed=0)
    with Journal.create(found.journal, header) as journal:
        for each in trials:
            journal.append(each)
    return folder
