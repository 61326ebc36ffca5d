"""`evomerge run`: search for the best merge."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<name>]")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Change a value of the experiment, such as search.evaluations=20. May be repeated.",
)
@click.option(
    "--allow-task-code", is_flag=True, help="Let task files outside lm-eval run the Python code they name."
)
@click.option("--allow-code", is_flag=True, help="Let them, and the experiment's own fitness functions run.")
def run(
    experiment: Path,
    run_dir: Path | None,
    overrides: tuple[str, ...],
    allow_task_code: bool,
    allow_code: bool,
) -> None:
    """Search for the best merge that EXPERIMENT describes."""
    from evomerge.cli.display import make_display, show_result
    from evomerge.cli.signals import stop_on_signals
    from evomerge.run import start_run

    with make_display() as display, stop_on_signals() as stop:
        result = start_run(
            experiment,
            run_dir,
            overrides=overrides,
            allow_task_code=allow_task_code,
            allow_code=allow_code,
            observer=display,
            stop=stop,
        )
    show_result(result)
