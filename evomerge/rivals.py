"""The models and merges that anyone would try first, and how they are scored beside a search.

Every evaluation is recorded in the journal, so that what is recorded is not scored again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evomerge.errors import EvomergeError
from evomerge.fitness.base import DocumentSet
from evomerge.loop import Run
from evomerge.prepare import PreparedRun
from evomerge.recipe import Recipe
from evomerge.records import Final, Outcome, Status
from evomerge.spaces.base import short_names
from evomerge.stages import WINNER
from evomerge.workers.base import Job

Documents = Literal["search", "confirm", "holdout"]
"""Which documents an evaluation is on, as `Final.stage` has it."""

UNIFORM = "uniform average"
SINGLE_SCALE = "task arithmetic"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model to score at the end: a recipe, or a checkpoint of its own."""

    name: str
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    recorded_recipe: Recipe | None = None


def model_labels(prepared: PreparedRun) -> dict[str, str]:
    """Model -> its name in the table: the sources and the base."""
    models = list(dict.fromkeys([*prepared.sources, *([prepared.base] if prepared.base else [])]))
    return {
        model: f"model {name}" if name in (WINNER, UNIFORM) or name.startswith(SINGLE_SCALE) else name
        for model, name in short_names(models).items()
    }


def source_entries(prepared: PreparedRun) -> list[Entry]:
    """The sources and the base, to be scored from their own checkpoints."""
    return [
        Entry(name=name, checkpoint=prepared.checkpoints[model].folder)
        for model, name in model_labels(prepared).items()
    ]


def uniform_average(prepared: PreparedRun) -> Recipe:
    """The plain average of the source models."""
    return Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in prepared.sources],
            **_dtypes(prepared),
        }
    )


def single_scale(prepared: PreparedRun) -> dict[str, Recipe]:
    """Task arithmetic with one scale for all sources, for every scale to be tried, by name."""
    others = [model for model in prepared.sources if model != prepared.base]
    if prepared.base is None or not others or not same_depth(prepared):
        return {}
    return {
        f"{SINGLE_SCALE} {scale:g}": Recipe.from_dict(
            {
                "merge_method": "task_arithmetic",
                "models": [{"model": model, "parameters": {"weight": scale}} for model in others],
                "base_model": prepared.base,
                **_dtypes(prepared),
            }
        )
        for scale in prepared.experiment.finish.baseline_scales
    }


def same_depth(prepared: PreparedRun) -> bool:
    """Whether the models can be merged layer by layer; those of a path of layers need not be that alike."""
    return len(set(prepared.stages[0].depths.values())) <= 1


def _dtypes(prepared: PreparedRun) -> dict[str, str]:
    space = prepared.stages[0].space
    start = space.decode(tuple(dimension.start for dimension in space.dimensions))
    assert start.dtype is not None
    assert start.out_dtype is not None
    return {"dtype": start.dtype, "out_dtype": start.out_dtype}


def score_entries(
    run: Run,
    entries: Sequence[Entry],
    documents: tuple[DocumentSet, ...],
    stage: Documents,
) -> list[Final]:
    """Score entries that are not recorded yet; return all of them in the given order.

    Raises:
        RunStoppedError: A stop was asked for.
        EvomergeError: The winner cannot be scored. This is not recorded, so that resuming tries again.
    """
    recorded = {final.name: final for final in run.journal.finals if final.stage == stage}
    waiting = {i: entry for i, entry in enumerate(entries) if entry.name not in recorded}
    jobs = [
        Job(number=index, documents=documents, recipe=entry.recipe, checkpoint=entry.checkpoint)
        for index, entry in waiting.items()
    ]
    failure: str | None = None
    for index, outcome in run.outcomes(jobs):
        entry = waiting[index]
        if entry.name == WINNER and outcome.status is not Status.OK:
            failure = outcome.reason
            continue
        recorded[entry.name] = final = _final(run, entry, outcome, stage)
        run.journal.append(final)
    if failure is not None:
        raise EvomergeError(
            f"the winner's checkpoint cannot be scored: {failure}; everything else is recorded, "
            f"`evomerge resume {run.run_dir.path}` tries it again"
        )
    return [recorded[entry.name] for entry in entries]


def _final(run: Run, entry: Entry, outcome: Outcome, stage: Documents) -> Final:
    recipe = entry.recipe or entry.recorded_recipe
    # A hash, because names that differ may look the same as file names.
    digest = hashlib.blake2b(entry.name.encode(), digest_size=4).hexdigest()
    file = f"{re.sub('[^A-Za-z0-9.]+', '-', entry.name)[-40:]}-{digest}-{stage}"
    is_ok = outcome.status is Status.OK
    return Final(
        name=entry.name,
        stage=stage,
        candidate=recipe.hash if recipe is not None else "",
        recipe=recipe.to_dict() if recipe is not None else None,
        status=outcome.status,
        reason=outcome.reason,
        metrics=outcome.metrics,
        scores=run.run_dir.write_scores(file, outcome.samples) if is_ok else "",
        seconds=outcome.seconds,
        counts=outcome.counts,
    )
