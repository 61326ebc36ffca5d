"""The end of a run: the winner against the models and merges anyone would try first, on held-out documents.

The winner is scored from its exported checkpoint, the sources from their own, the baselines as they are
merged. Every evaluation is recorded in the journal, so that an interrupted end continues where it was.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.fitness.constraints import judge
from evomerge.loop import Run
from evomerge.merge.export import export_model
from evomerge.prepare import PreparedRun
from evomerge.report.path_map import write_path_map
from evomerge.rivals import (
    UNIFORM,
    Entry,
    same_depth,
    score_entries,
    single_scale,
    source_entries,
    uniform_average,
)
from evomerge.stages import WINNER, Decoded


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
    scales = [Entry(name=name, recipe=recipe) for name, recipe in single_scale(prepared).items()]
    scored = score_entries(run, scales, prepared.search_documents, "search")
    entries = source_entries(prepared)
    entries += [
        Entry(name=f"winner of stage {stage.name}", checkpoint=run.run_dir.stage_model(stage.name))
        for stage in prepared.stages[:-1]
        if stage is not winner.stage
    ]
    if same_depth(prepared):
        entries.append(Entry(name=UNIFORM, recipe=uniform_average(prepared)))
    judged = [
        (judge(final.metrics, run.objectives, run.constraints), index)
        for index, final in enumerate(scored)
        if final.metrics
    ]
    if judged:
        _, index = max(
            judged,
            key=lambda pair: (-math.fsum(pair[0].violations.values()), pair[0].fitness, -pair[1]),
        )
        entries.append(scales[index])
    run.observer.phase("scoring the winner's checkpoint, the sources and the baselines on the holdout")
    with _winner_checkpoint(run, prepared, winner) as folder:
        entries.insert(0, Entry(name=WINNER, checkpoint=folder, recorded_recipe=winner.recipe))
        score_entries(run, entries, prepared.holdout_documents, "holdout")


@contextmanager
def _winner_checkpoint(run: Run, prepared: PreparedRun, winner: Decoded) -> Iterator[Path]:
    """The winner's checkpoint: kept in `best/model` when asked for, else for the time of its scoring."""
    keep = prepared.experiment.finish.export_model
    folder = run.run_dir.best_model if keep else run.run_dir.path / "best" / "model-for-holdout"
    is_scored = any(final.name == WINNER and final.stage == "holdout" for final in run.journal.finals)
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
