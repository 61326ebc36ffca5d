"""The released data-flow model's format is read, and its path becomes an ordinary Mistral."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralForCausalLM

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merge.export import export_model
from evomerge.merge.load import load_recipe
from evomerge.spaces.path import Hop
from evomerge.spaces.sakana import read_sakana
from tests.architectures import WORDS, make_family

LAYERS = [0, 2, 2, 1, 0]
SCALES = [0.75, 1.0, -0.5, 1.25, 0.0]


@pytest.fixture(scope="module")
def unique(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of the three layers that the paths run through."""
    return make_family(tmp_path_factory.mktemp("mistral"), "Mistral") / "one"


def released(unique: Path, folder: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """The layers in the released format; a config entry None removes the key."""
    folder.mkdir()
    state = load_file(unique / "model.safetensors")
    state["model.input_layers"] = torch.tensor(LAYERS, dtype=torch.int32)
    state["model.input_scales"] = torch.tensor(SCALES)
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    auto_map = {"AutoModelForCausalLM": "modeling_evomistral.EvoMistralForCausalLM"}
    settings = json.loads((unique / "config.json").read_text()) | {
        "model_type": "evomistral",
        "architectures": ["EvoMistralForCausalLM"],
        "auto_map": auto_map,
        "num_hops": 5,
        **config,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def keep(state: dict[str, Tensor]) -> None:
    """Change nothing."""


def by_the_released_rule(unique: Path, words: Tensor) -> Tensor:
    """What the released inference code computes: scaled branches join the residual in the next layer."""
    model = MistralForCausalLM.from_pretrained(unique, attn_implementation="eager").eval()
    body, length = model.model, words.shape[1]
    positions = torch.arange(length).unsqueeze(0)
    distance = positions.T - positions
    outside = (distance < 0) | (distance >= model.config.sliding_window)
    mask = torch.zeros(1, 1, length, length).masked_fill(outside, -torch.inf)
    hidden, residual = body.embed_tokens(words), torch.zeros(())
    rotary = body.rotary_emb(hidden, positions)
    for number, scale in zip(LAYERS, SCALES, strict=True):
        layer = body.layers[number]
        residual = residual + hidden * scale
        hidden = layer.input_layernorm(residual)
        hidden, _ = layer.self_attn(hidden, position_embeddings=rotary, attention_mask=mask)
        residual = residual + hidden
        hidden = layer.mlp(layer.post_attention_layernorm(residual))
    found: Tensor = model.lm_head(body.norm(residual + hidden))
    return found


def test_the_released_model_becomes_an_ordinary_mistral_that_computes_the_same(
    unique: Path, tmp_path: Path
) -> None:
    model = read_sakana(released(unique, tmp_path / "released", keep))
    assert model.hops == tuple(
        Hop(model=model.name, layer=layer, scale=scale) for layer, scale in zip(LAYERS, SCALES, strict=True)
    )
    assert model.checkpoint.tensors.keys() == Checkpoint.open(unique).tensors.keys()
    export_model(model.recipe("float32"), {model.name: model.checkpoint}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).keys() == (
        json.loads((unique / "config.json").read_text()).keys() | {"torch_dtype"}
    )
    ordinary, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(ordinary, MistralForCausalLM)
    assert ordinary.config.num_hidden_layers == 5
    words = torch.randint(3, WORDS, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ordinary.eval()(words).logits, by_the_released_rule(unique, words)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_the_path_may_also_stand_in_the_config(unique: Path, tmp_path: Path) -> None:
    def drop(state: dict[str, Tensor]) -> None:
        del state["model.input_layers"], state["model.input_scales"]

    lists = {"input_layers": LAYERS, "input_scales": SCALES, "num_hops": None, "num_hidden_layers": 5}
    one = read_sakana(released(unique, tmp_path / "lists", drop, **lists))
    other = read_sakana(released(unique, tmp_path / "tensors", keep))
    assert [(hop.layer, hop.scale) for hop in one.hops] == [(hop.layer, hop.scale) for hop in other.hops]
    assert one.checkpoint.config["num_hidden_layers"] == 3


def test_the_recipe_can_be_merged_from_its_file(unique: Path, tmp_path: Path) -> None:
    folder = released(unique, tmp_path / "released", keep)
    model = read_sakana(folder)
    (tmp_path / "recipe.yml").write_text(model.recipe("float32").to_yaml())
    loaded = load_recipe(tmp_path / "recipe.yml")
    export_model(loaded.recipe, loaded.checkpoints, tmp_path / "from_file")
    export_model(model.recipe("float32"), {model.name: model.checkpoint}, tmp_path / "direct")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("from_file", "direct"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def setting(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state.pop(name)
        if value is not None:
            state[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "config", "message"),
    [
        (
            "input_layers",
            None,
            {},
            "model.input_layers: expected a tensor, or a list in the config, with an entry per hop, found none",
        ),
        (
            "input_scales",
            None,
            {},
            "model.input_scales: expected a tensor, or a list in the config, with an entry per hop, found none",
        ),
        (
            "input_layers",
            torch.tensor([0, 1]),
            {},
            "input_layers: expected an entry for each of 5 hops, found 2",
        ),
        ("input_scales", torch.ones(6), {}, "input_scales: expected an entry for each of 5 hops, found 6"),
        ("input_scales", torch.tensor(1.0), {}, r"found shape \[\]"),
        (
            "input_layers",
            torch.tensor([0, 1, 3, 1, 0]),
            {},
            "model.input_layers: hop 2: expected a layer from 0 to 2, found 3",
        ),
        ("input_layers", torch.tensor([0, 1, -1, 1, 0]), {}, "hop 2: expected a layer from 0 to 2, found -1"),
        ("input_layers", torch.ones(5), {}, "hop 0: expected a layer from 0 to 2, found 1.0"),
        (
            "input_scales",
            torch.tensor([1, 1, 1, torch.nan, 1]),
            {},
            "model.input_scales: hop 3: expected a finite number, found nan",
        ),
        ("input_layers", torch.tensor(LAYERS), {"num_hops": 4}, "for each of 4 hops, found 5"),
        ("input_layers", torch.tensor([0, 1]), {"num_hops": None}, "for each of 2 hops, found 5"),
        ("input_layers", torch.tensor(LAYERS), {"input_layers": [0, 1.5, 2, 1, 0]}, "hop 1: .* found 1.5"),
        ("input_layers", torch.tensor(LAYERS), {"input_scales": [1, 1, "1", 1, 1]}, "hop 2: .* found 1"),
        (
            "input_layers",
            torch.tensor(LAYERS),
            {"model_type": "mistral"},
            "config.json: model_type: expected evomistral, found mistral",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_with_what_was_found(
    name: str, value: Tensor | None, config: dict[str, Any], message: str, unique: Path, tmp_path: Path
) -> None:
    folder = released(unique, tmp_path / "released", setting(f"model.{name}", value), **config)
    with pytest.raises(CheckpointError, match=message):
        read_sakana(folder)
