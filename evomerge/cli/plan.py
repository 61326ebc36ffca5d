"""`evomerge plan`: what a run or a merge will take, before it is started."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("file", metavar="EXPERIMENT|RECIPE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
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
@click.option("--allow-code", is_flag=True, help="The same here; a run also runs own fitness functions.")
def plan(
    file: Path, as_json: bool, overrides: tuple[str, ...], allow_task_code: bool, allow_code: bool
) -> None:
    """Say what EXPERIMENT or RECIPE will take.

    Memory, disk, evaluations and rough time, from headers and a short measurement; no weights are loaded.
    """
    from evomerge.plan import as_dict, plan_file
    from evomerge.plan.text import plan_text

    found = plan_file(file, overrides=overrides, allow_task_code=allow_task_code, allow_code=allow_code)
    if as_json:
        click.echo(json.dumps(as_dict(found), indent=2, ensure_ascii=False))
        return
    click.echo(plan_text(found))
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
