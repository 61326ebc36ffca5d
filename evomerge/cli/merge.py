"""`evomerge merge`: recipe to checkpoint."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--shard-size", default="5GB", show_default=True, help="Largest size of one weight file, such as 500MB."
)
def merge(recipe: Path, out_dir: Path, shard_size: str) -> None:
    """Merge RECIPE, evomerge's or mergekit's YAML, into the checkpoint folder OUT_DIR."""
    from evomerge.cli.display import progress_bar
    from evomerge.merge.export import export_model
    from evomerge.merge.load import load_recipe

    loaded = load_recipe(recipe)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    with progress_bar("merging") as progress:
        export_model(
            loaded.recipe,
            loaded.checkpoints,
            out_dir,
            shard_bytes=parse_bytes(shard_size),
            progress=progress,
        )
    click.echo(out_dir)


def parse_bytes(text: str) -> int:
    """Read a size such as 500MB or 2GB as bytes.

    Raises:
        BadParameter: The text is not a size.
    """
    import re

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"--shard-size: expected a size such as 500MB or 2GB, got {text!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
