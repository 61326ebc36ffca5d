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
    from evomerge.cli.display import table_text
    from evomerge.measured import with_error
    from evomerge.report.audit_text import audit_text
    from evomerge.report.status import read_status

    found = read_status(run_dir)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    evaluations, best = found.plain["evaluations"], found.plain["best"]
    click.echo(f"state         {found.state}")
    click.echo(f"evaluations   {evaluations['done']} of {evaluations['total']}")
    if best is not None:
        reached = with_error(best["fitness"], best["standard_error"])
        click.echo(
            f"best          fitness {reached} on the search documents (trial {best['trial']}, {best['candidate']})"
        )
    if found.holdout is not None:
        click.echo(f"\n{table_text(found.holdout)}")
    click.echo(f"\n{audit_text(found.audit)}")
