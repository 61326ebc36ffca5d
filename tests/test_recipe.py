"""Recipes are mergekit's YAML: read, written and evaluated alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from evomerge.errors import ConfigurationError
from evomerge.recipe import ConditionalValue, Kind, Recipe, TokenRow, ZeroRow, coerce, evaluate
from tests.oracle import MergeConfiguration, ModelReference, evaluate_setting
from tests.strategies import recipe_data
from tests.strategies import settings as parameter_settings

MODELS = "models: [{model: a}]\nmerge_method: linear\n"


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        Recipe.from_yaml(text, file="r.yml")
    return [str(fault) for fault in caught.value.faults]


def setting(text: str) -> list[ConditionalValue]:
    recipe = Recipe.from_yaml(f"{MODELS}parameters:\n  p: {text}\n")
    assert recipe.parameters is not None
    return recipe.parameters["p"]


def value(text: str, *, name: str = "model.layers.1.mlp.up_proj.weight", depth: float = 0.0) -> Any:
    return evaluate(setting(text), tensor_name=name, depth=depth, kind="float")


# Forms.


def test_the_three_forms_are_read() -> None:
    models = Recipe.from_yaml("models: [{model: a}, {model: b}]\nbase_model: c\nmerge_method: ties")
    assert models.model_names == ("a", "b", "c")
    slices = Recipe.from_yaml(
        "slices:\n- sources: [{model: b, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]\n"
        "  base_model: d\n- sources: [{model: b, layer_range: [1, 2]}]\nmerge_method: slerp"
    )
    assert slices.model_names == ("b", "a", "d")
    assert slices.slices is not None
    assert [piece.num_layers for piece in slices.slices] == [2, 1]
    modules = Recipe.from_yaml("modules: {default: {models: [{model: a}]}}\nmerge_method: linear")
    assert [place for place, _ in modules.inputs()] == [("modules", "default", "models", 0)]


@pytest.mark.parametrize(
    "text", ["", "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nmodels: [{model: a}]"]
)
def test_exactly_one_form_is_needed(text: str) -> None:
    (fault,) = faults(f"{text}\nmerge_method: linear")
    assert "expected exactly one of 'models', 'slices' and 'modules'" in fault


def test_a_module_has_exactly_one_form() -> None:
    (fault,) = faults("modules: {default: {}}\nmerge_method: linear")
    assert fault == "r.yml:1: modules.default: expected exactly one of 'models' and 'slices'"


@pytest.mark.parametrize("form", ["models: []", "slices: []", "slices: [{sources: []}]", "modules: {}"])
def test_empty_forms_are_refused(form: str) -> None:
    (fault,) = faults(f"{form}\nmerge_method: linear")
    assert "at least 1 item" in fault


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ("[2, 2]", "0 <= first < end"),
        ("[-1, 2]", "0 <= first < end"),
        ("[0]", "field required|at least 2|missing"),
        ("[0, half]", "expected a whole number, got 'half'"),
        ("[0, 1.5]", "expected a whole number, got 1.5"),
    ],
)
def test_layer_ranges_are_checked(span: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Recipe.from_yaml(f"slices: [{{sources: [{{model: a, layer_range: {span}}}]}}]\nmerge_method: x")


def test_slices_of_unequal_length_are_refused() -> None:
    sources = "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]"
    (fault,) = faults(f"slices: [{{sources: {sources}}}]\nmerge_method: x")
    assert fault.startswith(
        "r.yml:1: slices.0: sources: every layer_range of a slice must have the same length"
    )


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("a/b", "a/b"),
        ("a/b@main+c/d", "a/b@main+c/d"),
        ("{model: a/b}", "a/b"),
        ("{model: {path: a/b}}", "a/b"),
        ("{model: {path: a/b, revision: main}, lora: {path: c/d, revision: null}}", "a/b@main+c/d"),
        ("{model: {path: a b}, lora: null}", "a b"),
    ],
)
def test_mergekits_long_form_of_a_model_is_the_short_one(written: str, text: str) -> None:
    recipe = Recipe.from_yaml(f"models: [{{model: {written}}}]\nmerge_method: linear")
    assert recipe.model_names == (text,)
    expected = ModelReference.model_validate(yaml.safe_load(written))
    assert ModelReference.model_validate(text) == expected


@pytest.mark.parametrize(
    "written", ["{path: a}", "{model: {revision: a}}", "{model: a, override_architecture: b}", "1"]
)
def test_other_ways_to_name_a_model_are_refused(written: str) -> None:
    (fault,) = faults(f"merge_method: linear\nmodels:\n- model: {written}")
    assert fault.startswith("r.yml:3: models.0.model: ")


# Faults.


def test_unknown_keys_are_faults_with_line_and_nearest_name() -> None:
    text = "merge_metod: linear\nmerge_method: linear\nmodels:\n- model: a\n  paramters: {weight: 1}\n"
    assert [fault.split("; known")[0] for fault in faults(text)] == [
        "r.yml:5: models.0.paramters: unknown key (did you mean 'parameters'?)",
        "r.yml:1: merge_metod: unknown key (did you mean 'merge_method'?)",
    ]


def test_unknown_keys_of_conditional_values_are_faults() -> None:
    (fault,) = faults(f"{MODELS}parameters:\n  weight:\n  - filtr: mlp\n    value: 1\n")
    assert fault.startswith("r.yml:5: parameters.weight.0.filtr: unknown key (did you mean 'filter'?)")


@pytest.mark.parametrize(
    "written", ["null", "", "{value: {a: 1}}", "[1, [2]]", "{value: null}", "[{value: [1, ~]}]"]
)
def test_a_setting_is_a_scalar_or_a_list_of_scalars(written: str) -> None:
    (fault,) = faults(f"{MODELS}parameters:\n  weight: {written}\n")
    assert fault.startswith("r.yml:4: parameters.weight")
    assert "expected a number, true, false, text or a list of these, got" in fault


def test_tokenizer_and_tokenizer_source_exclude_each_other() -> None:
    (fault,) = faults(f"{MODELS}tokenizer_source: base\ntokenizer: {{source: union}}\n")
    assert "exclude each other" in fault


def test_settings_of_the_tokenizer_are_read() -> None:
    recipe = Recipe.from_yaml(
        f"{MODELS}tokenizer:\n  source: {{model: {{path: p, revision: r}}}}\n  pad_to_multiple_of: '8'\n"
        "  tokens:\n    <a>: {source: b, force: 'yes'}\n    <b>: {source: {kind: zero}}\n"
        "    <c>: {source: {kind: model_token, model: a, token_id: 3.0}}\n    <d>: {}\n"
    )
    assert recipe.tokenizer is not None
    assert (recipe.tokenizer.source, recipe.tokenizer.pad_to_multiple_of) == ("p@r", 8)
    tokens = recipe.tokenizer.tokens or {}
    assert [setting.force for setting in tokens.values()] == [True, False, False, False]
    assert [tokens[token].source for token in ("<a>", "<d>")] == ["b", None]
    assert isinstance(tokens["<b>"].source, ZeroRow)
    row = tokens["<c>"].source
    assert isinstance(row, TokenRow)
    assert (row.model, row.token, row.token_id) == ("a", None, 3)
    # As in mergekit, a model is one of the recipe's when it is merged.
    assert recipe.model_names == ("a",)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("{sorce: union}", "r.yml:3: tokenizer.sorce: unknown key (did you mean 'source'?)"),
        ("base", "r.yml:3: tokenizer: input should be a valid dictionary"),
        ("{pad_to_multiple_of: 0}", "r.yml:3: tokenizer.pad_to_multiple_of: input should be greater than"),
        ("{pad_to_multiple_of: x}", "r.yml:3: tokenizer.pad_to_multiple_of: expected a whole number"),
        ("{tokens: {<a>: b}}", "r.yml:3: tokenizer.tokens.<a>: input should be a valid dictionary"),
        (
            "{tokens: {<a>: {sauce: b}}}",
            "r.yml:3: tokenizer.tokens.<a>.sauce: unknown key (did you mean 'sou",
        ),
        ("{tokens: {<a>: {source: 3}}}", "r.yml:3: tokenizer.tokens.<a>.source: input should be a valid str"),
        ("{tokens: {<a>: {force: maybe}}}", "r.yml:3: tokenizer.tokens.<a>.force: expected true or false"),
        ("{tokens: {<a>: {force: true}}}", "r.yml:3: tokenizer.tokens.<a>: force: needs a 'source'"),
        (
            "{tokens: {<a>: {source: {kind: zeroo}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source: kind: expected zero or model_token, got 'zeroo'",
        ),
        (
            "{tokens: {<a>: {source: {kind: zero, model: a}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source.model: unknown key; known keys: kind",
        ),
        (
            "{tokens: {<a>: {source: {kind: model_token, model: a}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source: expected exactly one of 'token' and 'token_id'",
        ),
        (
            "{tokens: {<a>: {source: {kind: model_token, model: a, token: b, token_id: 1}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source: expected exactly one of 'token' and 'token_id'",
        ),
        (
            "{tokens: {<a>: {source: {kind: model_token, model: a, tok: b}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source.tok: unknown key (did you mean 'token'?)",
        ),
        (
            "{tokens: {<a>: {source: {kind: model_token, model: a, token_id: -1}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source.token_id: input should be greater than or equal to 0",
        ),
        (
            "{tokens: {<a>: {source: {kind: model_token, token_id: 1}}}}",
            "r.yml:3: tokenizer.tokens.<a>.source.model: missing",
        ),
    ],
)
def test_faults_of_the_tokenizers_settings_name_their_place(written: str, fault: str) -> None:
    (found,) = faults(f"{MODELS}tokenizer: {written}\n")
    assert found.startswith(fault)


def test_a_file_holds_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(f"{MODELS}---\n{MODELS}")
    with pytest.raises(ConfigurationError, match="found 2"):
        Recipe.read(tmp_path / "r.yml")
    with pytest.raises(ConfigurationError, match="found 2"):
        Recipe.from_yaml(f"{MODELS}---\n{MODELS}")


def test_later_faults_know_the_line_of_the_recipe() -> None:
    recipe = Recipe.from_yaml(MODELS, file="r.yml")
    assert str(recipe.fault(("merge_method",), "why")) == "r.yml:2: merge_method: why"
    assert str(Recipe.from_dict(recipe.to_dict()).fault(("merge_method",), "why")) == "merge_method: why"


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "x"])
def test_the_seed_is_a_63_bit_integer(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"evomerge\.seed"):
        Recipe.from_dict({"models": [{"model": "a"}], "merge_method": "x", "evomerge": {"seed": seed}})


def test_scales_of_merged_tensors_are_read_and_written() -> None:
    text = (
        "evomerge:\n  seed: 0\n  scales:\n  - tensor: model.norm.weight\n    factor: 0.5\n    offset: 1.0\n"
    )
    text += "  - tensor: lm_head.weight\n    factor: -2.0\n"
    recipe = Recipe.from_yaml(MODELS + text.replace("0.5", "5e-1"))
    found = [(scale.tensor, scale.factor, scale.offset) for scale in recipe.evomerge.scales]
    assert found == [("model.norm.weight", 0.5, 1.0), ("lm_head.weight", -2.0, 0.0)]
    assert recipe.to_yaml().endswith(text)
    assert Recipe.from_yaml(recipe.to_yaml()).hash == recipe.hash
    others = [
        text.replace("-2.0", "-2.5"),
        text.replace("offset: 1.0", "offset: 2.0"),
        "evomerge: {scales: []}",
    ]
    assert len({Recipe.from_yaml(MODELS + other).hash for other in [text, *others]}) == 4
    assert Recipe.from_yaml(MODELS + others[-1]).hash == Recipe.from_yaml(MODELS).hash


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        ("{tensor: w, factor: .nan}", "evomerge.scales.0.factor: expected a number, got nan"),
        ("{tensor: w, factor: .inf}", "evomerge.scales.0.factor: expected a number, got inf"),
        ("{tensor: w, factor: true}", "evomerge.scales.0.factor: expected a number, got True"),
        ("{tensor: w, factor: 1, offset: -.inf}", "evomerge.scales.0.offset: expected a number, got -inf"),
        ("{tensor: w}", "evomerge.scales.0.factor: missing; this key is required"),
        ("{factor: 1}", "evomerge.scales.0.tensor: missing; this key is required"),
        ("{tensor: w, factor: 1, ofset: 1}", "evomerge.scales.0.ofset: unknown key (did you mean 'offset'?)"),
        (
            "{tensor: w, factor: 1}, {tensor: w, factor: 2}",
            "evomerge: scales: expected every tensor once, got 'w' more than once",
        ),
    ],
)
def test_scales_that_say_nothing_sensible_are_refused(scale: str, reason: str) -> None:
    (fault,) = faults(f"{MODELS}evomerge: {{scales: [{scale}]}}\n")
    assert fault.startswith(f"r.yml:3: {reason}")


# Settings.


def test_settings_are_read_in_every_form() -> None:
    assert value("0.5") == 0.5
    assert value("{value: 0.5}") == 0.5
    assert value("[0, 1]", depth=0.25) == 0.25
    assert value("{value: [0, 1], filter: mlp}", depth=0.25) == 0.25
    assert value("[{filter: attn, value: 1}, {filter: mlp, value: 2}, {value: 3}]") == 2


def test_the_first_filter_that_matches_counts() -> None:
    text = "[{filter: q_proj, value: 1}, {filter: '*', value: 2}, {value: 3}]"
    assert value(text) == 2
    assert value(text, name="model.layers.0.self_attn.q_proj.weight") == 1
    assert value("[{filter: q_proj, value: 1}]") is None
    assert value("[{value: []}, {value: 1}]") is None


def test_gradients_are_interpolated_between_evenly_spread_points() -> None:
    assert [value("[0, 1, 0.5]", depth=depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    assert value("[0.3]", depth=1) == 0.3


def test_gradients_of_booleans_switch() -> None:
    gradient = setting("[true, false, true]")
    found = [evaluate(gradient, tensor_name="w", depth=depth, kind="bool") for depth in (0, 0.4, 0.5, 0.9, 1)]
    assert found == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("raw", "kind", "expected"),
    [
        ("1e-3", "float", 1e-3),
        (" .5 ", "float", 0.5),
        (2, "float", 2.0),
        ("3", "int", 3),
        (3.0, "int", 3),
        ("Yes", "bool", True),
        (0, "bool", False),
        (1.0, "bool", True),
    ],
)
def test_scalars_are_coerced(raw: Any, kind: Kind, expected: Any) -> None:
    found = coerce(raw, kind)
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ("half", "float"),
        ("nan", "float"),
        (float("inf"), "float"),
        (10**400, "float"),
        (True, "float"),
        (1.5, "int"),
        (float("inf"), "int"),
        ("maybe", "bool"),
        (2, "bool"),
    ],
)
def test_scalars_that_do_not_suit_are_refused(raw: Any, kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"expected (a number|a whole number|true or false), got"):
        coerce(raw, kind)


@settings(deadline=None)
@given(
    parameter_settings,
    st.sampled_from(["model.layers.1.mlp.w", "lm_head.weight", "model.norm.weight"]),
    st.floats(0, 1),
    st.sampled_from(["bool", "float"]),
)
def test_settings_have_the_value_they_have_in_mergekit(
    written: Any, name: str, depth: float, kind: Kind
) -> None:
    data = {"models": [{"model": "a"}], "merge_method": "linear", "parameters": {"p": written}}
    theirs = MergeConfiguration.model_validate(data)
    ours = Recipe.from_dict(data)
    assert theirs.parameters is not None
    assert ours.parameters is not None
    validate = TypeAdapter({"bool": bool, "float": float}[kind]).validate_python
    try:
        found = evaluate(ours.parameters["p"], tensor_name=name, depth=depth, kind=kind)
    except ValueError:
        return  # stricter on purpose: booleans and infinite sums are no numbers
    assert found == evaluate_setting(name, theirs.parameters["p"], depth, validate=validate)


# Writing.


@settings(deadline=None)
@given(recipe_data())
def test_recipes_survive_being_written(data: dict[str, Any]) -> None:
    untouched = copy.deepcopy(data)
    recipe = Recipe.from_dict(data)
    assert data == untouched
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.to_yaml() == recipe.to_yaml()


@settings(deadline=None)
@given(recipe_data())
def test_mergekit_reads_what_is_written_as_what_was_read(data: dict[str, Any]) -> None:
    written = yaml.safe_load(Recipe.from_dict(data).to_yaml())
    assert _plain(MergeConfiguration.model_validate(written)) == _plain(
        MergeConfiguration.model_validate(data)
    )


def _plain(configuration: Any) -> Any:
    return _long(configuration.model_dump(exclude_none=True))


def _long(data: Any, *, inside_parameters: bool = False) -> Any:
    """mergekit's values with every setting in the long form."""
    if isinstance(data, dict) and inside_parameters:
        return {key: _conditionals(item) for key, item in data.items()}
    if isinstance(data, dict):
        # An empty mapping of parameters says as much as none.
        return {key: _long(item, inside_parameters=key == "parameters") for key, item in data.items()}
    return [_long(item) for item in data] if isinstance(data, list) else data


def _conditionals(written: Any) -> Any:
    if isinstance(written, dict):
        written = [written]
    if not (isinstance(written, list) and any(isinstance(item, dict) for item in written)):
        written = [{"value": written}]
    return [(item.get("filter"), repr(item["value"])) for item in written]


def test_short_settings_are_written_short() -> None:
    text = "models:\n- model: a\n  parameters:\n    weight: 0.5\n    density: [0.1, 0.9]\n"
    text += "merge_method: ties\nbase_model: b\nevomerge:\n  seed: 3\n"
    assert Recipe.from_yaml(text).to_yaml() == text


def test_equal_recipes_have_equal_hashes_and_others_do_not() -> None:
    long = "models: [{model: a, parameters: {weight: [{value: 0.5}]}}]\nmerge_method: linear"
    short = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 0.5}}]\nevomerge: {seed: 0}"
    assert Recipe.from_yaml(long) == Recipe.from_yaml(short)
    assert len({Recipe.from_yaml(long), Recipe.from_yaml(short)}) == 1
    others = [short.replace("seed: 0", "seed: 1"), short.replace("0.5", "0.6"), short.replace(": a", ": b")]
    others += [short.replace("0.5", "1"), short.replace("0.5", "1.0"), short.replace("0.5", "true")]
    assert len({Recipe.from_yaml(text).hash for text in [short, *others]}) == 7
    assert len({Recipe.from_yaml(text) for text in [short, *others]}) == 7
    assert Recipe.from_yaml(short) != "text"


def test_the_hash_is_stable_across_versions() -> None:
    text = "models: [{model: é, parameters: {weight: [0.1, 1e-5]}}]\nmerge_method: linear"
    assert Recipe.from_yaml(text).hash == "946baf7062a8c23c"
