"""Trials of a run by number, with their recipes."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import ConfigurationError
from evomerge.journal import Journal
from evomerge.prepare import stages_of
from evomerge.records import Trial
from evomerge.run_dir import RunDir
from evomerge.stages import Decoded, Stage, decoded, named_winner


def choose_trial(journal: Journal, run_dir: Path, number: int | None) -> Trial:
    """A recorded trial.

    Args:
        journal: The run's journal.
        run_dir: The run directory, for messages.
        number: The trial's number; None for the winner, or the best so far.

    Raises:
        ConfigurationError: There is no such trial.
    """
    trial = (
        named_winner(journal.trials, journal.finals)
        if number is None
        else journal.trials_by_number.get(number)
    )
    if trial is None:
        wanted = "valid trial" if number is None else f"trial {number}"
        raise ConfigurationError(f"{run_dir}: no {wanted} is recorded; {len(journal.trials)} trials are")
    return trial


def open_stages(journal: Journal) -> tuple[Stage, ...]:
    """The searches of a run, with their spaces; of the models only headers are read.

    Raises:
        ConfigurationError: A model cannot be opened.
    """
    return stages_of(journal.header.settings)


def decode_trial(run_dir: Path, number: int | None) -> Decoded:
    """A trial with its recipe, decoded from its genome as during the search.

    Args:
        run_dir: The run directory.
        number: The trial's number; None for the winner, or the best so far.

    Raises:
        ConfigurationError: There is no such run or trial.
    """
    journal = Journal.load(RunDir(run_dir).journal)
    trial = choose_trial(journal, run_dir, number)
    found = decoded(trial, open_stages(journal), journal.trials)
    if found.recipe.hash != trial.candidate:
        raise ConfigurationError(
            f"{run_dir}: trial {trial.number} decodes to recipe {found.recipe.hash}, recorded is "
            f"{trial.candidate}; another version of evomerge wrote this run, use that one"
        )
    return found
