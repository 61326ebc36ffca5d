"""`evomerge merge`: recipe to checkpoint."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evomerge.sizes import parse_size

if TYPE_CHECKING:
    from evomerge.checkpoints.reader import Checkpoint
    from evomerge.recipe import Recipe


class Size(click.ParamType[int]):
    """A number of bytes, written such as 500MB or 2GB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the size."""
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--shard-size",
    type=Size(),
    default="5GB",
    show_default=True,
    help="Largest size of one weight file, such as 500MB.",
)
@click.option(
    "--memory-budget",
    type=Size(),
    help="Largest size of weights in memory at once, such as 2GB, on top of 200 to 400 MB for the "
    "process itself.  [default: chunks of 4 MB, and whole tensors where a method needs them]",
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda.")
@click.option(
    "--intermediate-dir",
    type=click.Path(path_type=Path),
    help="Keep the other merges of a file of several recipes here, and use them again when nothing they are "
    "made from changed.",
)
def merge(
    recipe: Path,
    out_dir: Path,
    shard_size: int,
    memory_budget: int | None,
    device: str,
    intermediate_dir: Path | None,
) -> None:
    """Merge RECIPE, evomerge's or mergekit's YAML, into the checkpoint folder OUT_DIR.

    RECIPE may hold several documents, as mergekit-multi takes them; the final merge goes to OUT_DIR.
    """
    with _no_search_for_garbage():
        _merge(recipe, out_dir, shard_size, memory_budget, device, intermediate_dir)


def _merge(
    recipe: Path,
    out_dir: Path,
    shard_size: int,
    memory_budget: int | None,
    device: str,
    intermediate_dir: Path | None,
) -> None:
    from evomerge.cli.display import progress_bar
    from evomerge.merge.export import export_model
    from evomerge.merge.multi import merge_all, read_merges

    def export(
        each: Recipe, models: Mapping[str, Checkpoint], target: Path, merges: Sequence[Recipe]
    ) -> None:
        with progress_bar("merging") as progress:
            export_model(
                each,
                models,
                target,
                shard_bytes=shard_size,
                memory_budget=memory_budget,
                device=device,
                merges=merges,
                warn=warn,
                progress=progress,
            )

    def warn(text: object) -> None:
        click.echo(f"warning: {text}", err=True)

    file = read_merges(recipe)
    for warning in file.warnings:
        warn(warning)
    merge_all(
        file,
        out_dir,
        export,
        intermediate_dir=intermediate_dir,
        news=lambda text: click.echo(f"note: {text}", err=True),
    )
    click.echo(out_dir)


@contextlib.contextmanager
def _no_search_for_garbage() -> Iterator[None]:
    """Spare Python its search for reference cycles, which takes a quarter of the time of merging small models.

    The libraries make 250 000 objects that all stay, and the search goes through them over and over while they
    are imported and again when the process ends. The merge itself leaves no cycles worth a search.
    """
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.enable()
