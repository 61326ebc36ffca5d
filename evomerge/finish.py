"""The end of a run: the winner against the models and merges anyone would try first, on held-out documents.

The winner is scored from its exported checkpoint, the sources from their own, the baselines as they are
merged. Every evaluation is recorded in the journal, so that an interrupted end continues where it was.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evomerge.errors import EvomergeError
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import fitness
from evomerge.loop import Decoded, Run
from evomerge.merge.export import export_model
from evomerge.prepare import PreparedRun
from evomerge.recipe import Recipe
from evomerge.records import Final, Outcome, Status
from evomerge.report.holdout import WINNER
from evomerge.report.path_map import write_path_map
from evomerge.spaces.base import short_names
from evomerge.workers.base import Job

UNIFORM = "uniform average"
SINGLE_SCALE = "task arithmetic"


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A model to score at the end: a recipe, or a checkpoint of its own."""

    name: str
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    recorded_recipe: Recipe | None = None


def finish(run: Run, prepared: PreparedRun, winner: Decoded) -> None:
    """Score the winner, the sources and the baselines on the holdout, and record it.

    Args:
        run: The run whose last search is over.
        prepared: Its experiment.
        winner: Its winner.

    Raises:
        RunStoppedError: A stop was asked for.
        EvomergeError: The winner's checkpoint cannot be scored.
    """
    run.write_status("finishing")
    write_path_map(run.run_dir.best_path, winner.stage, winner.trial, base=prepared.base)
    if not prepared.holdout_documents:
        if prepared.experiment.finish.export_model and not run.run_dir.best_model.exists():
            _export(winner, prepared, run.run_dir.best_model)
        run.news(
            "no holdout documents were kept (evaluation.holdout is 0), so nothing can be said beyond the search"
        )
        return
    run.observer.phase("choosing the scale of the task-arithmetic baseline on the search documents")
    scales = [_Entry(name=name, recipe=recipe) for name, recipe in single_scale(prepared).items()]
    scored = _score(run, scales, prepared.search_documents, "search")
    entries = [
        _Entry(name=name, checkpoint=prepared.checkpoints[model].folder)
        for model, name in model_labels(prepared).items()
    ]
    entries += [
        _Entry(name=f"winner of stage {stage.name}", checkpoint=run.run_dir.stage_model(stage.name))
        for stage in prepared.stages[:-1]
        if stage is not winner.stage
    ]
    if _same_depth(prepared):
        entries.append(_Entry(name=UNIFORM, recipe=uniform_average(prepared)))
    valid = [(fitness(final.metrics, run.objectives), i) for i, final in enumerate(scored) if final.metrics]
    if valid:
        _, index = max(valid, key=lambda pair: (pair[0], -pair[1]))
        entries.append(scales[index])
    run.observer.phase("scoring the winner's checkpoint, the sources and the baselines on the holdout")
    with _winner_checkpoint(run, prepared, winner) as folder:
        entries.insert(0, _Entry(name=WINNER, checkpoint=folder, recorded_recipe=winner.recipe))
        _score(run, entries, prepared.holdout_documents, "holdout")


def model_labels(prepared: PreparedRun) -> dict[str, str]:
    """Model -> its name in the table: the sources and the base."""
    models = list(dict.fromkeys([*prepared.sources, *([prepared.base] if prepared.base else [])]))
    return {
        model: f"model {name}" if name in (WINNER, UNIFORM) or name.startswith(SINGLE_SCALE) else name
        for model, name in short_names(models).items()
    }


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
    if prepared.base is None or not others or not _same_depth(prepared):
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


def _same_depth(prepared: PreparedRun) -> bool:
    """Whether the models can be merged layer by layer; those of a path of layers need not be that alike."""
    return len(set(prepared.stages[0].depths.values())) <= 1


def _dtypes(prepared: PreparedRun) -> dict[str, str]:
    space = prepared.stages[0].space
    start = space.decode(tuple(dimension.start for dimension in space.dimensions))
    assert start.dtype is not None
    assert start.out_dtype is not None
    return {"dtype": start.dtype, "out_dtype": start.out_dtype}


@contextmanager
def _winner_checkpoint(run: Run, prepared: PreparedRun, winner: Decoded) -> Iterator[Path]:
    """The winner's checkpoint: kept in `best/model` when asked for, else for the time of its scoring."""
    keep = prepared.experiment.finish.export_model
    folder = run.run_dir.best_model if keep else run.run_dir.path / "best" / "model-for-holdout"
    is_scored = any(final.name == WINNER for final in run.journal.finals)
    try:
        if not folder.exists() and (keep or not is_scored):
            run.observer.phase("writing the winner's checkpoint")
            _export(winner, prepared, folder)
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _export(winner: Decoded, prepared: PreparedRun, folder: Path) -> None:
    export_model(winner.recipe, prepared.checkpoints, folder, merges=winner.merges)


def _score(
    run: Run,
    entries: Sequence[_Entry],
    documents: tuple[DocumentSet, ...],
    stage: Literal["search", "holdout"],
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


def _final(run: Run, entry: _Entry, outcome: Outcome, stage: Literal["search", "holdout"]) -> Final:
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
