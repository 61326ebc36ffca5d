"""The config of a stack of layers says of every layer what its source said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from evomerge.errors import CheckpointError
from evomerge.merge.config import merged_config
from evomerge.merge.plan import plan_merge
from tests.architectures import make_family

from .models import variant
from .zoo import models, recipe

STACK = """
slices:
- {sources: [{model: $one, layer_range: [0, 3]}]}
- {sources: [{model: $two, layer_range: [1, 3]}]}
merge_method: passthrough
"""
AVERAGE = "models: [{model: $one}, {model: $two}]\nmerge_method: linear\nparameters: {weight: 1}\n"


def config_of(text: str, zoo: Path) -> dict[str, Any]:
    wanted = recipe(text, zoo)
    sources = models(wanted)
    return merged_config(plan_merge(wanted, sources), sources)


def with_config(zoo: Path, folder: Path, *, two: dict[str, Any] | None = None, **config: Any) -> Path:
    """The models `one` and `two` with another config."""
    variant(zoo / "one", folder / "one", **config)
    variant(zoo / "two", folder / "two", **(config | (two or {})))
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("gemma"), "Gemma3Text")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("qwen"), "Qwen3Moe", mlp_only_layers=[1])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 2}, "sfsfs"),
        ({"layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 3}, "ssfsf"),
        (
            {
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
                "sliding_window_pattern": 2,
            },
            "ffsfs",
        ),
    ],
)
def test_a_pattern_of_layers_becomes_a_list(
    gemma: Path, tmp_path: Path, rule: dict[str, Any], expected: str
) -> None:
    found = config_of(STACK, with_config(gemma, tmp_path, **rule))
    assert "".join(kind[0] for kind in found["layer_types"]) == expected
    assert not any("pattern" in key for key in found)
    read = transformers.CONFIG_MAPPING["gemma3_text"].from_dict(found)
    assert read.layer_types == found["layer_types"]
    assert read.num_hidden_layers == 5


def test_a_threshold_of_layers_becomes_a_list(tmp_path: Path) -> None:
    rule = {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}
    zoo = make_family(tmp_path / "made", "Qwen2")
    made = with_config(zoo, tmp_path, **rule, max_window_layers=1, two={"max_window_layers": 2})
    found = config_of(STACK, made)
    assert "".join(kind[0] for kind in found["layer_types"]) == "fssfs"


def test_layers_that_stay_keep_the_config(gemma: Path, qwen: Path, tmp_path: Path) -> None:
    pattern = {"layer_types": None, "sliding_window_pattern": 2}
    step = with_config(qwen, tmp_path / "step", decoder_sparse_step=2)
    for zoo in (with_config(gemma, tmp_path, **pattern), qwen, step):
        before = json.loads((zoo / "one" / "config.json").read_text())
        before |= {"dtype": "float32", "torch_dtype": "float32"}
        assert config_of(AVERAGE, zoo) == before


def test_dense_layers_among_experts_are_listed(qwen: Path) -> None:
    found = config_of(STACK, qwen)
    assert (found["mlp_only_layers"], found["decoder_sparse_step"]) == ([1, 3], 1)


def test_the_step_of_experts_is_written_out(tmp_path: Path) -> None:
    zoo = make_family(tmp_path, "Qwen3Moe", decoder_sparse_step=2, mlp_only_layers=[])
    found = config_of(STACK, zoo)
    assert (found["mlp_only_layers"], found["decoder_sparse_step"]) == ([0, 2, 4], 1)


@pytest.mark.parametrize(
    "rule",
    [
        {"attn_layer_period": 2},
        {"attn_layer_offset": 1},
        {"first_k_dense_replace": 1},
        {"cross_attention_layers": [1]},
        {"num_kv_shared_layers": 1},
        {"scale_attn_by_inverse_layer_idx": True},
        {"global_attn_every_n_layers": 3},
        {"attention_types": [[["global", "local"], 2]]},
        {"sliding_window_pattern": 2},
        {"use_sliding_window": True, "max_window_layers": 1},
    ],
)
def test_a_rule_that_has_no_list_is_refused_where_layers_move(
    tiny_zoo: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    zoo = with_config(tiny_zoo, tmp_path, **rule)
    key, value = list(rule.items())[-1]
    with pytest.raises(CheckpointError) as caught:
        config_of(STACK, zoo)
    assert f"{key}: {value!r} says what layers are by their number" in str(caught.value)
    assert "one: config.json: " in str(caught.value)
    assert config_of(AVERAGE, zoo)[key] == value


@pytest.mark.parametrize(
    "rule",
    [
        {"attn_layer_period": 1},
        {"num_kv_shared_layers": 0},
        {"cross_attention_layers": []},
        {"scale_attn_by_inverse_layer_idx": False},
        {"use_sliding_window": False, "max_window_layers": 28},
    ],
)
def test_a_rule_that_tells_no_layers_apart_is_kept(
    tiny_zoo: Path, tmp_path: Path, rule: dict[str, Any]
) -> None:
    found = config_of(STACK, with_config(tiny_zoo, tmp_path, **rule))
    assert {key: found[key] for key in rule} == rule


def test_layers_of_another_model_in_their_old_place_need_the_same_rule(
    tiny_zoo: Path, tmp_path: Path
) -> None:
    text = STACK.replace("[1, 3]", "[3, 4]")
    same = with_config(tiny_zoo, tmp_path / "same", attn_layer_period=2)
    assert config_of(text, same)["attn_layer_period"] == 2
    other = with_config(tiny_zoo, tmp_path / "other", attn_layer_period=2, two={"attn_layer_period": 4})
    with pytest.raises(CheckpointError, match="attn_layer_period: 2"):
        config_of(text, other)


def test_a_nested_config_of_the_text_is_changed_in_its_place(tiny_zoo: Path, tmp_path: Path) -> None:
    text = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}
    zoo = with_config(tiny_zoo, tmp_path, num_hidden_layers=None, text_config=text)
    wanted = recipe(STACK, zoo)
    sources = models(wanted)
    found = merged_config(plan_merge(wanted, sources), sources)
    assert found["text_config"] == {"num_hidden_layers": 5, "layer_types": ["a", "b", "c", "b", "c"]}
    assert "num_hidden_layers" not in found
    assert all(checkpoint.config["text_config"] == text for checkpoint in sources.values())


def test_every_statement_of_the_depth_is_changed(tiny_zoo: Path, tmp_path: Path) -> None:
    zoo = with_config(tiny_zoo, tmp_path, num_layers=4)
    found = config_of(STACK, zoo)
    assert (found["num_layers"], found["num_hidden_layers"]) == (5, 5)
