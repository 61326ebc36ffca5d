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


def validate_file(
    file: Path, *, allow_task_code: bool = False, allow_code: bool = False
) -> tuple[str, list[str]]:
    """Check one file.

    Args:
        file: An experiment, a search space, a recipe, or several recipes.
        allow_task_code: Whether task files outside lm-eval may run Python code.
        allow_code: Whether they may, and a run might run functions of the user's; here none is run.

    Returns:
        The kind of file, and warnings.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    kind = kind_of(file)
    match kind:
        case "experiment":
            return kind, list(prepare(file, allow_task_code=allow_task_code, allow_code=allow_code).warnings)
        case "search space":
            read_space(read_single(file))
            return kind, []
        case "recipe":
            return kind, [str(warning) for warning in load_recipe(file).warnings]
    return kind, [str(warning) for warning in read_merges(file).warnings]


def kind_of(file: Path) -> str:
    """Tell an `experiment`, a `search space`, a `recipe` and a `file of 2 recipes` from each other.

    Raises:
        ConfigurationError: The file is none of these.
    """
    documents = read_yaml(file, lenient=True)
    if len(documents) > 1:
        return f"file of {len(documents)} recipes"
    document = read_single(file, lenient=True)
    data = document.data
    if looks_like_experiment(data):
        return "experiment"
    if isinstance(data, dict) and data.get("type") in SPACES:
        return "search space"
    if isinstance(data, dict) and "merge_method" in data:
        return "recipe"
    reason = "neither an experiment (objectives), nor a search space (type), nor a recipe (merge_method)"
    raise ConfigurationError(document.fault((), reason))
