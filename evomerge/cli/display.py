"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere.

Messages go to stderr; the result goes to stdout.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from evomerge.measured import with_error
from evomerge.records import Dimension, Trial
from evomerge.report.aligned import aligned

if TYPE_CHECKING:
    from rich.live import Live

    from evomerge.loop import Observer
    from evomerge.report.holdout import HoldoutTable
    from evomerge.run import RunResult

NUM_GENES = 8
"""How many numbers of the best recipe the panel shows."""


@contextmanager
def make_display() -> Iterator[Observer]:
    """A live display when stderr is a terminal, plain lines otherwise."""
    if not sys.stderr.isatty():
        yield PlainDisplay()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:
        yield LiveDisplay(live)


class PlainDisplay:
    """One line per phase, event and generation."""

    def __init__(self) -> None:
        self._progress = Progress()

    def phase(self, text: str) -> None:
        """Say what begins."""
        click.echo(f"{text} ...", err=True)

    def search(self, dimensions: Sequence[Dimension]) -> None:
        """Say how much is searched."""
        click.echo(f"searching {len(dimensions)} numbers", err=True)

    def event(self, text: str) -> None:
        """Say what happened."""
        click.echo(f"note: {text}", err=True)

    def trial(self, trial: Trial, *, done: int, total: int, generation: int, best: Trial | None) -> None:
        """Sum up the generation so far, whenever it is complete enough to tell something."""
        finished = self._progress.add(trial, done=done, total=total, generation=generation, best=best)
        if finished or done == total:
            click.echo(self._progress.line(), err=True)


class LiveDisplay:
    """A panel that is redrawn in place."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._progress = Progress()
        self._phase = ""

    def phase(self, text: str) -> None:
        """Show what is going on."""
        self._phase = text
        self._draw()

    def search(self, dimensions: Sequence[Dimension]) -> None:
        """Learn what the numbers of a genome are called."""
        self._progress.names = [dimension.name for dimension in dimensions]

    def event(self, text: str) -> None:
        """Print above the panel."""
        self._live.console.print(f"note: {text}", markup=False, highlight=False)

    def trial(self, trial: Trial, *, done: int, total: int, generation: int, best: Trial | None) -> None:
        """Redraw."""
        self._progress.add(trial, done=done, total=total, generation=generation, best=best)
        self._draw()

    def _draw(self) -> None:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        progress = self._progress
        rows: list[Text | ProgressBar] = [Text(self._phase)]
        if progress.done:
            rows += [ProgressBar(total=progress.total, completed=progress.done), *map(Text, progress.rows())]
        self._live.update(Panel(Group(*rows), title="evomerge", title_align="left"))


class Progress:
    """The numbers behind a display."""

    def __init__(self) -> None:
        self.done = 0
        self.total = 0
        self.names: list[str] = []
        self._first_done = 0
        self._started = time.monotonic()
        self._generation = -1
        self._scored: list[tuple[float, int, float | None]] = []
        self._previous: list[tuple[float, int, float | None]] = []
        self._best: Trial | None = None

    def add(self, trial: Trial, *, done: int, total: int, generation: int, best: Trial | None) -> bool:
        """Take in a trial; tell whether it is the first of a new generation."""
        is_new = generation != self._generation
        if self._generation < 0:
            self._first_done, self._started = done - 1, time.monotonic() - trial.seconds.get("total", 0.0)
        if is_new:
            self._generation, self._previous, self._scored = generation, self._scored, []
        if trial.fitness is not None:
            self._scored.append((trial.fitness, trial.number, trial.standard_error))
        self.done, self.total, self._best = done, total, best
        return is_new

    def rows(self) -> list[str]:
        """Evaluations, fitness and the best recipe, a line each."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        per_minute = (self.done - self._first_done) / elapsed * 60
        left = (self.total - self.done) / per_minute if per_minute else float("inf")
        known = self._scored or self._previous
        rows = [
            f"generation {self._generation}   evaluations {self.done}/{self.total}   "
            f"{per_minute:.1f} per minute   {left:.1f} min left"
        ]
        best = self._best
        if best is not None and best.fitness is not None and known:
            # The median candidate, not the median of their numbers, as a candidate's error is known.
            median, _, error = statistics.median_low(known)
            rows.append(
                f"fitness: best {with_error(best.fitness, best.standard_error)}   "
                f"median {with_error(median, error)}"
            )
            genes = [f"{name} {value:.2f}" for name, value in zip(self.names, best.genome, strict=False)]
            more = f"   and {len(genes) - NUM_GENES} more" if len(genes) > NUM_GENES else ""
            rows.append(f"best recipe (trial {best.number}): {'   '.join(genes[:NUM_GENES])}{more}")
        return rows

    def line(self) -> str:
        """Everything on one line."""
        return "   ".join(self.rows()[:2])


def show_result(result: RunResult) -> None:
    """Print a finished run's result on stdout."""
    from evomerge.report.audit_text import audit_text

    click.echo(f"run directory   {result.run_dir}")
    click.echo(f"best recipe     {result.run_dir}/best/recipe.yml")
    assert result.best.fitness is not None
    reached = with_error(result.best.fitness, result.best.standard_error)
    click.echo(
        f"best fitness    {reached} on the search documents, the best of many (trial {result.best.number})"
    )
    if result.holdout is not None:
        click.echo(f"\n{table_text(result.holdout)}")
    click.echo(f"\n{audit_text(result.audit)}")
    if not result.commands:
        return
    click.echo("\nTo check the winner with lm-eval itself:")
    if not (result.run_dir / "best" / "model").exists():
        target = f"{result.run_dir}/best/model"
        click.echo(f"  evomerge export {result.run_dir} {target} --format model")
    for command in result.commands:
        click.echo(f"  {command}")


def table_text(table: HoldoutTable) -> str:
    """The holdout table as aligned text."""
    labels = list(table.rows[0].metrics)
    lines = [["on held-out documents", "fitness", *labels, "winner's lead", "p"]]
    for row in table.rows:
        test = table.tests.get(row.name)
        lines.append(
            [
                row.name,
                with_error(row.fitness.mean, row.fitness.standard_error),
                *(with_error(row.metrics[label], row.errors[label]) for label in labels),
                "" if test is None else with_error(test.difference, test.standard_error, signed=True),
                "" if test is None else f"{test.p_value:.2g}",
            ]
        )
    text = aligned(lines)
    text += [f"{row.name} violates {label}" for row in table.rows[:1] for label in row.violations]
    text += [f"{name} could not be scored: {reason}" for name, reason in table.failed.items()]
    text += ["", f"{table.rows[0].num_documents} documents each, ± is the standard error; {table.verdict}"]
    return "\n".join(text)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; the function takes (bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
