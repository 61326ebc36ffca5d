"""The command line: one file per verb, each thin.

Modules of verbs import only click at their top, so that `evomerge --help` is quick.
"""

from __future__ import annotations

import sys

import click

from evomerge.cli.evaluate import evaluate
from evomerge.cli.export import export
from evomerge.cli.listing import methods, searchers, spaces
from evomerge.cli.merge import merge
from evomerge.cli.path import path
from evomerge.cli.plan import plan
from evomerge.cli.resume import resume
from evomerge.cli.run import run
from evomerge.cli.status import status
from evomerge.cli.validate import validate
from evomerge.errors import EvomergeError

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="evomerge-recipes", prog_name="evomerge")
def evomerge() -> None:
    """Evolutionary search for the best way to merge language models.

    Exit codes: 0 done, 1 failure, 2 usage or configuration, 3 refused for safety, 4 no valid candidate,
    75 stopped but resumable, 130 interrupted.
    """


for command in (
    run,
    resume,
    status,
    validate,
    plan,
    merge,
    evaluate,
    export,
    path,
    methods,
    spaces,
    searchers,
):
    evomerge.add_command(command)


def main() -> None:
    """Entry point: run the command and turn errors into messages and exit codes."""
    try:
        code = evomerge.main(standalone_mode=False)
    except EvomergeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
