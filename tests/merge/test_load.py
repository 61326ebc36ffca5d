"""A recipe file is opened with its models, or refused with every reason at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigurationError
from evomerge.merge.load import load_recipe


def test_relative_models_are_found_beside_the_recipe(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(tiny_zoo)
    file = tmp_path / "recipe.yml"
    file.write_text("models: [{model: models/one}]\nmerge_method: passthrough\nparameters: {weight: 1}\n")
    loaded = load_recipe(file)
    assert loaded.checkpoints["models/one"].folder == tmp_path / "models" / "one"
    assert len(loaded.plan.tensors) == 39
    (warning,) = loaded.warnings
    assert str(warning).startswith(
        f"{file}:3: parameters.weight: passthrough has no such parameter and ignores it; it belongs to linear,"
    )


def test_every_model_that_cannot_be_opened_is_named_at_its_line(tiny_zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(
        f"models:\n- model: ./nowhere\n- model: {tiny_zoo}/onne\n- model: a@b@c\n"
        f"merge_method: ties\nbase_model: {tiny_zoo}/base+adapter\nparameters: {{weight: 1}}\n"
    )
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(file)
    found = [str(fault) for fault in caught.value.faults]
    assert [fault.split(": ")[0] for fault in found] == [f"{file}:{line}" for line in (2, 3, 4, 6)]
    assert "did you mean 'one'" in found[1]
    assert "no such folder" in found[3]
