"""Models of several modules from the command line: merged, checked, planned; no search takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.modular import add_processor, load, logits, make_family
from tests.tiny import EXPERIMENT, make_experiment

RECIPE = """\
modules:
  text_decoder:
    models: [{model: llava/one, parameters: {weight: 0.6}}, {model: mistral/two, parameters: {weight: 0.5}}]
merge_method: ties
base_model: mistral/base
parameters: {density: 0.5}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modular")
    for name in ("Llava", "Mistral"):
        make_family(folder / name.lower(), name)
    add_processor(folder / "llava" / "one")
    return folder


@pytest.fixture
def recipe(zoo: Path, tmp_path: Path) -> Path:
    """The recipe, with its models beside it."""
    for name in ("llava", "mistral"):
        (tmp_path / name).symlink_to(zoo / name)
    file = tmp_path / "recipe.yml"
    file.write_text(RECIPE)
    return file


def test_merge_writes_a_model_that_takes_images(command: Command, recipe: Path, tmp_path: Path) -> None:
    found = command("merge", recipe, "out")
    assert found.code == 0, found.err
    left_out = "does not speak of multi_modal_projector, vision_tower, so the merged model gets llava/one's"
    assert f"warning: {recipe}:1: modules: {left_out}" in found.err
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    logits(load(tmp_path / "out"))


def test_validate_and_plan_tell_the_modules(command: Command, recipe: Path) -> None:
    found = command("validate", recipe)
    assert (found.code, found.out) == (0, f"{recipe}: valid recipe\n")
    assert "so the merged model gets llava/one's" in found.err
    result = json.loads(command("plan", recipe, "--json").out)["result"]
    assert result["modules"] == {"multi_modal_projector": 0, "text_decoder": 3, "vision_tower": 2}
    assert result["layers"] == 3
    text = command("plan", recipe).out
    assert "multi_modal_projector, text_decoder of 3 layers, vision_tower of 2" in text


def test_an_unknown_module_is_named_with_its_line(command: Command, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("text_decoder:", "text_decodr:"))
    for verb in ("validate", "plan", "merge"):
        found = command(verb, recipe, *(["out"] if verb == "merge" else []))
        assert found.code != 0
        assert "recipe.yml:2: modules.text_decodr: unknown module (did you mean 'text_decoder'?)" in found.err


@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_no_search_takes_models_of_several_modules(
    verb: str, command: Command, zoo: Path, tmp_path: Path
) -> None:
    experiment = make_experiment(tmp_path, zoo / "llava", EXPERIMENT)
    found = command(verb, experiment)
    assert found.code != 0
    for place in ("experiment.yml:2: base_model", "experiment.yml:4: models.0", "experiment.yml:5: models.1"):
        assert f"{place}: expected one stack of decoder layers, found several: 'language_model" in found.err
    assert "a search takes plain language models, only `evomerge merge` takes others" in found.err
    assert not (tmp_path / "runs").exists()
