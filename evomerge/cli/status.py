"""`evomerge status`: what a run is doing or has found."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def status(run_dir: Path, as_json: bool) -> None:
    """Show the state of the run in RUN_DIR; it may be running."""
    from evomerge.report.status import run_status

    found = run_status(run_dir)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    evaluations, best = found["evaluations"], found["best"]
    click.echo(f"state         {found['state']}")
    click.echo(f"evaluations   {evaluations['done']} of {evaluations['total']}, {found['invalid']} not valid")
    if best is not None:
        click.echo(
            f"best          fitness {best['fitness']:.4f} (trial {best['trial']}, {best['candidate']})"
        )
    if found["holdout"] is not None:
        click.echo()
        for row in found["holdout"]["rows"]:
            fitness = row["fitness"]
            click.echo(f"{row['name']:<24} {fitness['mean']:.4f} ± {fitness['standard_error']:.4f}")
        click.echo(found["holdout"]["verdict"])
