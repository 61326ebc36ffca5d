"""Plans of recipes: the merge then takes what was said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.errors import ConfigurationError
from evomerge.merge.export import export_model
from evomerge.merge.load import load_recipe
from evomerge.plan import as_dict, plan_file
from evomerge.plan.recipe_records import RecipePlan
from evomerge.plan.text import plan_text
from evomerge.report.validate import validate_file
from tests.plan.conftest import measured
from tests.standins import LLAMA_2_7B, make_standin, weights_read

RECIPE = """\
merge_method: {method}
base_model: {zoo}/base
models:
  - {{model: {zoo}/one, parameters: {{{own}}}}}
  - {{model: {zoo}/two, parameters: {{{own}}}}}
dtype: float32
out_dtype: {dtype}
"""


def recipe(folder: Path, zoo: Path, method: str = "task_arithmetic", dtype: str = "bfloat16") -> Path:
    file = folder / "recipe.yml"
    own = "weight: 0.5, density: 0.5" if method in ("ties", "della") else "weight: 0.5"
    file.write_text(RECIPE.format(zoo=zoo, method=method, dtype=dtype, own="" if method == "sce" else own))
    return file


def planned(file: Path) -> RecipePlan:
    plan = plan_file(file, measured=measured)
    assert isinstance(plan, RecipePlan)
    return plan


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_merge_writes_what_was_planned(dtype: str, tmp_path: Path, tiny_zoo: Path) -> None:
    file = recipe(tmp_path, tiny_zoo, dtype=dtype)
    plan = planned(file)
    loaded = load_recipe(file)
    export_model(loaded.recipe, loaded.checkpoints, tmp_path / "out")
    assert plan.result.bytes == plan.disk.written == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (plan.result.dtype, plan.result.layers, plan.result.shards) == (dtype, 4, 1)
    assert plan.result.tensors == len(loaded.plan.tensors)
    assert plan.disk.read == sum(model.bytes for model in plan.models)
    assert {model.parameters for model in plan.models} == {plan.result.parameters}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "sce", "della"])
def test_the_smallest_budget_is_enough_and_less_is_not(method: str, tmp_path: Path, tiny_zoo: Path) -> None:
    file = recipe(tmp_path, tiny_zoo, method)
    smallest = planned(file).memory.smallest_budget
    loaded = load_recipe(file)
    export_model(loaded.recipe, loaded.checkpoints, tmp_path / "out", memory_budget=smallest)
    with pytest.raises(ConfigurationError, match="--memory-budget"):
        export_model(
            loaded.recipe, loaded.checkpoints, tmp_path / "less", memory_budget=round(0.88 * smallest)
        )


def test_models_of_7_billion_parameters_are_planned_without_reading_them(tmp_path: Path) -> None:
    for name in ("base", "one", "two"):
        make_standin(tmp_path / name, **LLAMA_2_7B)
    file = recipe(tmp_path, tmp_path, "ties")
    before = sum(weights_read(tmp_path / name) for name in ("base", "one", "two"))
    plan = planned(file)
    assert validate_file(file) == ("recipe", [])
    assert sum(weights_read(tmp_path / name) for name in ("base", "one", "two")) == before < 2**20
    assert plan.result.parameters == 6_738_415_616
    assert plan.result.bytes == pytest.approx(13_476_831_232, abs=10**6)
    assert plan.result.shards == 3
    assert plan.disk.read == 3 * 13_476_831_232
    assert plan.memory.default < 10**8, "the merge is streamed"
    # Two histograms of every tensor; the sources are read twice and the result is written, at 1 GB/s.
    assert plan.seconds.low == pytest.approx(2 + 2 * 6.738 * 4 + (2 * 3 + 1) * 13.477, rel=0.01)


def test_a_lack_of_disk_and_memory_is_warned_of(
    tmp_path: Path, tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path, tiny_zoo)
    assert planned(file).warnings == ()
    monkeypatch.setattr("evomerge.plan.recipe.free_disk", lambda _: 1000)
    monkeypatch.setattr("evomerge.plan.recipe.available_memory", lambda: 1000)
    found = planned(file).warnings
    assert [warning.split(":")[0] for warning in found] == ["disk", "memory"]
    assert "--memory-budget can be as small as" in found[1]


def test_warnings_of_the_recipe_come_along(tmp_path: Path, tiny_zoo: Path) -> None:
    file = recipe(tmp_path, tiny_zoo)
    file.write_text(file.read_text() + "parameters: {density: 0.5}\n")
    assert [str(fault) for fault in load_recipe(file).warnings] == list(planned(file).warnings) != []


def test_the_text_fits_a_screen_and_json_has_the_documented_keys(tmp_path: Path, tiny_zoo: Path) -> None:
    plan = planned(recipe(tmp_path, tiny_zoo))
    lines = plan_text(plan).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 14
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    found = json.loads(json.dumps(as_dict(plan)))
    assert found["kind"] == "recipe"
    for key in [*found, *found["result"], *found["memory"], *found["disk"], *found["seconds"]]:
        assert f"`{key}`" in page, key
