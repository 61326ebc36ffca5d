"""`evomerge validate`: find every fault of a file at once."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--allow-task-code", is_flag=True, help="Let task files outside lm-eval run the Python code they name."
)
@click.option("--allow-code", is_flag=True, help="The same here; a run also runs own fitness functions.")
def validate(files: tuple[Path, ...], allow_task_code: bool, allow_code: bool) -> None:
    """Check experiments, search spaces and recipes; of models only headers are read."""
    from evomerge.errors import ConfigurationError
    from evomerge.report.validate import validate_file

    faulty = 0
    for file in files:
        try:
            kind, warnings = validate_file(file, allow_task_code=allow_task_code, allow_code=allow_code)
        except ConfigurationError as error:
            faulty += 1
            click.echo(str(error), err=True)
            continue
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        click.echo(f"{file}: valid {kind}")
    if faulty:
        raise SystemExit(ConfigurationError.exit_code)
