"""`evomerge resume`: continue a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--allow-task-code", is_flag=True, help="Let task files outside lm-eval run the Python code they name."
)
@click.option("--allow-code", is_flag=True, help="Let them, and the experiment's own fitness functions run.")
def resume(run_dir: Path, allow_task_code: bool, allow_code: bool) -> None:
    """Continue the run in RUN_DIR exactly where it was."""
    from evomerge.cli.display import make_display, show_result
    from evomerge.cli.signals import stop_on_signals
    from evomerge.run import resume_run

    with make_display() as display, stop_on_signals() as stop:
        result = resume_run(
            run_dir,
            allow_task_code=allow_task_code,
            allow_code=allow_code,
            observer=display,
            stop=stop,
        )
    show_result(result)
