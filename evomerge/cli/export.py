"""`evomerge export`: reuse a trial of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trial", type=int, help="Number of the trial.  [default: the best]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["recipe", "model"]),
    default="recipe",
    show_default=True,
    help="A recipe file, or a merged checkpoint with tokenizer.",
)
def export(run_dir: Path, out: Path, trial: int | None, form: str) -> None:
    """Write a trial of the run in RUN_DIR to OUT, as a recipe or as a checkpoint."""
    from evomerge.checkpoints.writer import write_atomic
    from evomerge.cli.display import progress_bar
    from evomerge.errors import RefusedError
    from evomerge.merge.card import recipes_text
    from evomerge.merge.export import export_model
    from evomerge.merge.load import open_models
    from evomerge.report.trials import decode_trial
    from evomerge.run_dir import RunDir

    found = decode_trial(run_dir, trial)
    if form == "recipe":
        if out.exists():
            raise RefusedError(f"{out}: exists already; name a new file")
        write_atomic(out, recipes_text(found.recipe, found.merges))
    else:
        stages = {merge.name or "": RunDir(run_dir).stage_model(merge.name or "") for merge in found.merges}
        checkpoints = open_models(found.recipe, run_dir.resolve(), stages)
        with progress_bar("merging") as progress:
            export_model(found.recipe, checkpoints, out, merges=found.merges, progress=progress)
    click.echo(out)
