"""Tells what kind of file a YAML is, and checks it as that."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import ConfigurationError
from evomerge.experiment import looks_like_experiment
from evomerge.merge.load import load_recipe
from evomerge.merge.multi import read_merges
from evomerge.prepare import prepare
from evomerge.spaces import SPACES, read_space
from evomerge.yaml_file import read_single, read_yaml


def validate_file(file: Path, *, allow_task_code: bool = False) -> tuple[str, list[str]]:
    """Check one file.

    Args:
        file: An experiment, a search space, a recipe, or several recipes.
        allow_task_code: Whether task files outside lm-eval may run Python code.

    Returns:
        The kind of file, and warnings.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    documents = read_yaml(file, lenient=True)
    if len(documents) > 1:
        merges = read_merges(file)
        return f"file of {len(documents)} recipes", [str(warning) for warning in merges.warnings]
    document = read_single(file, lenient=True)
    data = document.data
    if looks_like_experiment(data):
        return "experiment", list(prepare(file, allow_task_code=allow_task_code).warnings)
    if isinstance(data, dict) and data.get("type") in SPACES:
        read_space(read_single(file))
        return "search space", []
    if isinstance(data, dict) and "merge_method" in data:
        return "recipe", [str(warning) for warning in load_recipe(file).warnings]
    reason = "neither an experiment (objectives), nor a search space (type), nor a recipe (merge_method)"
    raise ConfigurationError(document.fault((), reason))
