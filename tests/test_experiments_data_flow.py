"""The experiments over layers are valid, and the planted path is what its page says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.anatomy import anatomy_of
from evomerge.merge.execute import merge_tensor
from evomerge.merge.plan import plan_merge
from evomerge.report.validate import validate_file
from evomerge.spaces.folding import path_recipe
from evomerge.spaces.path import Hop

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = [*sorted((EXPERIMENTS / "data_flow").glob("*.yml")), EXPERIMENTS / "planted_path" / "experiment.yml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_experiment_is_valid_and_opens_with_its_command(file: Path) -> None:
    assert validate_file(file) == ("experiment", [])
    assert file.read_text().startswith(f"# evomerge run {file.relative_to(EXPERIMENTS.parent)}\n")


def test_the_planted_path_restores_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS / "planted_path")
    monkeypatch.delitem(sys.modules, "make", raising=False)
    import make  # type: ignore[import-not-found]  # the script beside the experiment

    path: Any = make.PATH
    models = EXPERIMENTS / "planted_path" / "models"
    checkpoints = {name: Checkpoint.open(models / name) for name in ("front", "back", "original")}
    hops = [Hop(model=name, layer=layer) for name, layer in path]
    anatomies = {name: anatomy_of(checkpoints[name]) for name in ("front", "back")}
    recipe = path_recipe(hops, "branch", anatomies, dtype="bfloat16")
    plan = plan_merge(recipe, checkpoints)
    original = checkpoints["original"]
    assert {tensor.name for tensor in plan.tensors} == set(original.tensors)
    for tensor in plan.tensors:
        assert merge_tensor(tensor, checkpoints).equal(original.tensor(tensor.name)), tensor.name
