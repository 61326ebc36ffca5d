"""Recipes are held against the methods' declarations, every fault at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evomerge.errors import ConfigurationError
from evomerge.merge.check import check_recipe
from evomerge.merge.methods import METHODS
from evomerge.recipe import Recipe

TIES = """\
models:
- model: a
  parameters: {weight: 1}
- model: b
  parameters: {weight: 1}
merge_method: ties
base_model: base
"""
SLICES = """\
slices:
- sources:
  - {model: a, layer_range: [0, 1]}
  - {model: base, layer_range: [0, 1]}
- sources:
  - {model: b, layer_range: [1, 2]}
  - {model: base, layer_range: [1, 2]}
base_model: base
merge_method: slerp
"""


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        check_recipe(Recipe.from_yaml(text, file="r.yml"))
    return [str(fault) for fault in caught.value.faults]


def warnings(text: str) -> list[str]:
    return [str(warning) for warning in check_recipe(Recipe.from_yaml(text, file="r.yml"))]


def test_a_good_recipe_has_neither_faults_nor_warnings() -> None:
    assert warnings(TIES + "parameters: {density: [{filter: mlp, value: [0.1, 1e-3]}, {value: 1}]}") == []
    assert warnings(SLICES + "parameters: {t: 0.5}") == []


def test_an_unknown_method_names_the_nearest_and_all_others() -> None:
    (fault,) = faults(TIES.replace("ties", "dare-ties"))
    assert fault.startswith("r.yml:6: merge_method: unknown method 'dare-ties' (did you mean 'dare_ties'?)")
    assert fault.endswith("known methods: " + ", ".join(sorted(METHODS)))


def test_an_unknown_parameter_names_the_nearest_at_its_line() -> None:
    (fault,) = faults(TIES + "parameters:\n  densty: 0.5\n")
    assert fault == (
        "r.yml:9: parameters.densty: unknown parameter (did you mean 'density'?); "
        "parameters of ties: weight, density, normalize, lambda, int8_mask, rescale"
    )


def test_a_parameter_of_another_method_is_a_warning() -> None:
    (warning,) = warnings(TIES + "parameters:\n  t: 0.5\n")
    assert (
        warning
        == "r.yml:9: parameters.t: ties has no such parameter and ignores it; it belongs to slerp, nearswap"
    )


def test_parameters_without_effect_where_they_stand_are_warnings() -> None:
    text = TIES.replace("{weight: 1}", "{weight: 1, normalize: false}", 1)
    (warning,) = warnings(text)
    assert warning.startswith("r.yml:3: models.0.parameters.normalize: has no effect on a single model")
    (warning,) = warnings(TIES.replace("base_model: base", "base_model: a"))
    assert warning.startswith("r.yml:3: models.0.parameters.weight: has no effect on the base model")


@pytest.mark.parametrize("value", ["0", "-0.1", "1.01", "[0.5, 0]", "[{filter: mlp, value: 0}, {value: 1}]"])
def test_density_lies_above_0_and_up_to_1(value: str) -> None:
    (fault,) = faults(TIES + f"parameters:\n  density: {value}\n")
    assert fault.startswith("r.yml:9: parameters.density: expected a number in (0, 1], got ")


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("lambda: high", "expected a number, got 'high'"),
        ("lambda: .nan", "expected a number, got nan"),
        ("normalize: 0.5", "expected true or false, got 0.5"),
    ],
)
def test_values_must_suit_the_parameter(parameter: str, reason: str) -> None:
    (fault,) = faults(TIES + f"parameters:\n  {parameter}\n")
    assert fault == f"r.yml:9: parameters.{parameter.split(':')[0]}: {reason}"


def test_a_missing_base_is_reported_once() -> None:
    (fault,) = faults(TIES.replace("base_model: base\n", ""))
    assert "base_model: missing; ties needs a base model" in fault
    found = faults(SLICES.replace("base_model: base\n", "") + "parameters: {t: 0}")
    assert sum("base_model: missing" in fault for fault in found) == 1


def test_slices_must_list_the_base_themselves() -> None:
    text = SLICES.replace("model: base, layer_range: [1", "model: c, layer_range: [1") + "parameters: {t: 0}"
    (fault,) = faults(text)
    assert fault.startswith("r.yml:5: slices.1.sources: slerp needs the base model 'base' among the sources")
    nuslerp = text.replace("slerp", "nuslerp").replace("{t: 0}", "{weight: 1}")
    _, fault = faults(nuslerp)
    assert "slices.1.sources: nuslerp needs the base model 'base' among the sources" in fault
    own_base = text.replace("- sources:\n  - {model: b", "- base_model: c\n  sources:\n  - {model: b")
    assert warnings(own_base) == []


def recipe(method: str, *models: str, base: str | None = None, parameters: str = "{}") -> str:
    listed = ", ".join(f"{{model: {name}}}" for name in models)
    head = f"base_model: {base}\n" if base else ""
    return f"{head}merge_method: {method}\nmodels: [{listed}]\nparameters: {parameters}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (recipe("slerp", "a", "b", base="c"), "slerp takes exactly 1 model besides the base 'c'; got a, b"),
        (recipe("slerp", "a", base="a"), "slerp takes exactly 1 model besides the base 'a'; got none"),
        (recipe("nearswap", "a", "b", "c", base="c"), "takes exactly 1 model besides the base 'c'; got a, b"),
        (recipe("arcee_fusion", "a", base="a"), "takes exactly 1 model besides the base 'a'; got none"),
        (recipe("model_stock", "a", base="b"), "takes at least 2 models besides the base 'b'; got a"),
        (recipe("nuslerp", "a", "b", base="b"), "takes exactly 2 models besides the base 'b'; got a"),
        (recipe("nuslerp", "a", "b", "c"), "nuslerp takes exactly 2 models; got a, b, c"),
        (recipe("multislerp", "a", base="a"), "takes at least 1 model besides the base 'a'; got none"),
        (recipe("passthrough", "a", "b"), "passthrough takes at most 1 model; got a, b"),
        (recipe("passthrough", "a", base="b"), "passthrough takes at most 1 model; got a, b"),
    ],
)
def test_the_number_of_models_besides_the_base_must_suit_the_method(text: str, reason: str) -> None:
    (fault,) = faults(text.replace("parameters: {}", "parameters: {t: 0.5, weight: 1}"))
    assert fault.startswith("r.yml:")
    assert reason in fault


def test_an_optional_base_may_be_left_out_or_named() -> None:
    for base in (None, "c", "base"):
        assert warnings(recipe("nuslerp", "a", "b", base=base, parameters="{weight: 1}")) == []
    assert warnings(recipe("nuslerp", "a", "b", "c", base="c", parameters="{weight: 1}")) == []


def test_a_base_that_is_ignored_is_a_model_like_the_others() -> None:
    assert warnings(recipe("karcher", "a", "b", base="c")) == []


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].base == "required"))
def test_a_method_on_task_vectors_says_that_it_needs_a_base(name: str) -> None:
    (fault,) = faults(recipe(name, "a", parameters="{weight: 1, t: 1}"))
    assert fault.endswith(
        f"base_model: missing; {name} needs a base model, the one its sources were fine-tuned from"
    )


def test_a_model_counts_once_per_merge() -> None:
    (fault,) = faults(TIES.replace("model: b", "model: a"))
    assert fault == "r.yml:1: models: the model 'a' appears twice in one merge"
    assert warnings(SLICES.replace("model: b", "model: a") + "parameters: {t: 0}") == []


def test_a_required_parameter_that_nothing_gives_is_missing() -> None:
    (fault,) = faults(TIES.replace("\n  parameters: {weight: 1}", "", 1))
    assert fault == "r.yml:2: models.0.parameters.weight: missing; ties requires it"
    (fault,) = faults(SLICES)
    assert fault.endswith("parameters.t: missing; slerp requires it")
    of_one = SLICES.replace("- sources:\n  - {model: a", "- parameters: {t: 0}\n  sources:\n  - {model: a")
    assert len(faults(of_one)) == 1  # the other slice still lacks it
    for level in ("modules: {default: {parameters: {t: 0}, ", "parameters: {t: 0}\nmodules: {default: {"):
        form = "models: [{model: a}]}}\nbase_model: base\nmerge_method: slerp"
        assert warnings(level + form) == []


def test_an_average_needs_a_weight_for_a_base_that_joins_by_itself() -> None:
    text = TIES.replace("ties", "linear")
    (fault,) = faults(text)
    assert fault.startswith("r.yml:7: base_model: linear merges the base model too and requires its 'weight'")
    assert warnings(text + "parameters: {weight: 1}") == []


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_only_types_a_model_can_be_written_in_are_known(key: str) -> None:
    (fault,) = faults(TIES + f"{key}: bfloat-16\n")
    assert f"r.yml:8: {key}: expected one of float32, bfloat16, float16, got 'bfloat-16'" in fault
    assert "did you mean 'bfloat16'" in fault


def test_every_module_is_checked() -> None:
    one, two = "{models: [{model: a}]}", "{models: [{model: a}, {model: b, parameters: {scale: x}}]}"
    first, second = faults(f"modules: {{x: {one}, y: {two}}}\nmerge_method: passthrough")
    assert "modules.y.models.1.parameters.scale: expected a number, got 'x'" in first
    assert "modules.y.models: passthrough takes at most 1 model; got a, b" in second


def test_every_fault_comes_at_once() -> None:
    text = TIES.replace("{weight: 1}", "{wieght: 1}") + "dtype: int4\nparameters: {density: 2}\n"
    assert [fault.split(":")[1] for fault in faults(text)] == ["8", "9", "3", "5", "3", "5"]


def test_checking_needs_no_torch() -> None:
    code = "import sys, evomerge.merge.check, evomerge.spaces; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
