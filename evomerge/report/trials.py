"""Trials of a run by number, with their recipes."""

from __future__ import annotations

from pathlib import Path

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, resolve
from evomerge.errors import ConfigurationError
from evomerge.journal import Journal
from evomerge.loop import best_trial
from evomerge.prepare import source_models
from evomerge.recipe import Recipe
from evomerge.run_dir import RunDir
from evomerge.spaces import build_space
from evomerge.yaml_file import Document


def trial_recipe(run_dir: Path, number: int | None) -> Recipe:
    """The recipe of a trial, decoded from its genome as during the search.

    Args:
        run_dir: The run directory.
        number: The trial's number; None for the best.

    Raises:
        ConfigurationError: There is no such run or trial.
    """
    journal = Journal.load(RunDir(run_dir).journal)
    trial = best_trial(journal.trials) if number is None else journal.trials_by_number.get(number)
    if trial is None:
        wanted = "valid trial" if number is None else f"trial {number}"
        raise ConfigurationError(f"{run_dir}: no {wanted} is recorded; {len(journal.trials)} trials are")
    settings = journal.header.settings
    names = list(
        dict.fromkeys([*settings["models"], *([settings["base_model"]] if settings["base_model"] else [])])
    )
    checkpoints = {name: Checkpoint.open(resolve(ModelReference.parse(name))) for name in names}
    models = source_models(checkpoints, tuple(settings["models"]), settings["base_model"])
    recipe = build_space(Document(data=settings["search_space"]), models).decode(trial.genome)
    if recipe.hash != trial.candidate:
        raise ConfigurationError(
            f"{run_dir}: trial {trial.number} decodes to recipe {recipe.hash}, recorded is {trial.candidate}; "
            "another version of evomerge wrote this run, use that one"
        )
    return recipe
