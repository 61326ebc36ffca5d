"""A live config says of its layers what the merged checkpoint's does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import transformers

from evomerge.errors import CheckpointError
from evomerge.merge.config import merged_config
from evomerge.merge.layer_settings import LayerSettings, describe
from evomerge.merge.plan import plan_merge

from .models import variant
from .paths import make_pair, open_pair, path

HOPS = [("two", 3), ("one", 1), ("one", 1), ("two", 0), ("two", 2)]
KEYS = ("num_hidden_layers", "layer_types", "no_rope_layers", "mlp_only_layers", "decoder_sparse_step")


def settings_of(folder: Path) -> LayerSettings:
    return LayerSettings(transformers.AutoModelForCausalLM.from_pretrained(folder / "one"), open_pair(folder))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama", {}),
        ("GPT2", {}),
        ("Mistral", {}),
        ("Qwen3", {}),
        ("Gemma3Text", {}),
        ("Gemma2", {"layer_types": None}),
        ("Qwen3Moe", {"decoder_sparse_step": 2}),
        ("Qwen3Moe", {"mlp_only_layers": [1]}),
    ],
)
def test_a_config_says_what_that_of_the_checkpoint_does(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_pair(tmp_path, name, **config)
    checkpoints = open_pair(folder)
    settings, live = settings_of(folder), transformers.AutoConfig.from_pretrained(folder / "one")
    for hops in (HOPS, HOPS[:2], [("one", 0), ("one", 1), ("one", 2)]):
        plan = plan_merge(path(hops), checkpoints)
        describe(live, settings.of_plan(plan))
        merged = merged_config(plan, checkpoints)
        expected = type(live).from_dict(copy.deepcopy(merged))
        if "decoder_sparse_step" in config and hops[0][0] == "one":
            expected.mlp_only_layers, expected.decoder_sparse_step = [0, 2], 1  # the same without a rule
        for key in KEYS:
            assert getattr(live, key, None) == getattr(expected, key, None), key


def test_layers_are_of_one_kind_if_they_differ_in_nothing_but_weights(tmp_path: Path) -> None:
    settings = settings_of(make_pair(tmp_path / "moe", "Qwen3Moe", mlp_only_layers=[1]))
    kinds = settings.kinds(settings.of_layers([("one", 0), ("two", 1), ("two", 0), ("one", 1)]))
    assert kinds[0] == kinds[2]
    assert kinds[1] == kinds[3]
    assert kinds[0] != kinds[1]
    mixed = settings_of(make_pair(tmp_path / "mixed", "Gemma3Text"))
    own = mixed.kinds(mixed.own)
    assert len(own) == 3
    assert own[0] == own[2] != own[1]


def test_what_the_checkpoints_config_cannot_say_is_refused_every_time(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / "pair", "Llama")
    for child in ("one", "two"):
        variant(folder / child, tmp_path / child, expert_layer_period=2)
    settings, checkpoints = settings_of(tmp_path), open_pair(tmp_path)
    settings.of_plan(plan_merge(path([("one", 0), ("one", 1), ("one", 2)]), checkpoints))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="expert_layer_period"):
            settings.of_plan(plan_merge(path(HOPS), checkpoints))
