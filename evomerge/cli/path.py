"""`evomerge path`: see the path of a model through the layers of its sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.text import Text


@click.command()
@click.argument("what", type=click.Path(path_type=Path))
@click.option("--png", type=click.Path(path_type=Path), help="Draw it into this PNG file, too.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Write the path of a checkpoint into this new file, as a recipe.",
)
@click.option("--trial", type=int, help="Number of a run's trial.  [default: the best]")
@click.option(
    "--population", is_flag=True, help="Show which layers the candidates of a run keep, by generation."
)
def path(what: Path, png: Path | None, recipe: Path | None, trial: int | None, population: bool) -> None:
    """Show the path of WHAT as a map: hops to the right, layers upwards, the scale as colour.

    WHAT is a run directory, a passthrough recipe, or a checkpoint made by one. EvoLLM-JP-v1-10B and other checkpoints
    in its format are read, too; --recipe makes recipes of them.
    """
    from evomerge.report.path_files import is_run, path_of_file
    from evomerge.report.path_map import path_of_run
    from evomerge.report.path_text import path_text
    from evomerge.report.population import population_of_run, population_text

    run_only = {"--trial": trial is not None, "--population": population}
    if not is_run(what) and any(run_only.values()):
        option = next(name for name, given in run_only.items() if given)
        raise click.UsageError(f"{option} is for run directories; {what} is none")
    if population and trial is not None:
        raise click.UsageError("--trial and --population exclude each other: a population is of all trials")
    if png is not None and png.suffix.lower() != ".png":
        raise click.UsageError(f"--png: expected a file that ends in .png, got {png}")
    if recipe is not None:
        _write_recipe(what, recipe)
    width, plain = terminal()
    if population:
        found = population_of_run(what)
        lines = population_text(found, width=width, plain=plain)
    else:
        drawn = path_of_run(what, trial) if is_run(what) else path_of_file(what)
        lines = path_text(drawn, width=width, plain=plain)
    show(lines, plain=plain)
    if png is not None:
        from evomerge.report.figures import path_figure, population_figure, write_figure

        write_figure(population_figure(found) if population else path_figure(drawn), png)
        click.echo(f"note: wrote {png}", err=True)


def terminal() -> tuple[int, bool]:
    """The width of the output, and whether it takes no colour or no more than ASCII."""
    from rich.console import Console

    console = Console()
    plain = console.no_color or console.color_system is None or not console.encoding.startswith("utf")
    return console.width, plain


def show(lines: Iterable[Text], *, plain: bool) -> None:
    """Print lines as they are on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines:
        if plain:
            click.echo(line.plain)
        else:
            console.print(line, soft_wrap=True)


def _write_recipe(what: Path, file: Path) -> None:
    from evomerge.checkpoints.writer import write_atomic
    from evomerge.errors import RefusedError
    from evomerge.report.path_files import checkpoint_recipe, is_run

    if is_run(what) or not what.is_dir():
        raise click.UsageError("--recipe is for checkpoints; `evomerge export` writes the recipes of runs")
    if file.exists():
        raise RefusedError(f"{file}: exists already; name a new file")
    write_atomic(file, checkpoint_recipe(what).to_yaml())
    click.echo(f"note: wrote {file}", err=True)
