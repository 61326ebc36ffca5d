"""Layers and parts are told from the names that real models have, in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from evomerge.checkpoints.architecture import (
    TensorRole,
    before_layers,
    classify,
    is_constant,
    layer_name,
    num_layers,
    stacks,
)
from tests.architectures import MODELS, tiny


@pytest.fixture(scope="module", params=MODELS)
def roles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorRole]:
    """The roles of all tensors as saved, checked to be those of the tensors in memory."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param)
    model.save_pretrained(folder)
    in_memory = classify(model.state_dict())
    with safe_open(str(folder / "model.safetensors"), framework="pt") as handle:
        on_disk = classify(handle.keys())
    # Some models store one tensor per expert and hold one for all in memory.
    for name in in_memory.keys() & on_disk.keys():
        assert in_memory[name] == on_disk[name]
    assert num_layers(in_memory) == 3
    return on_disk


def test_all_layers_of_a_model_are_found(roles: dict[str, TensorRole]) -> None:
    assert num_layers(roles) == 3
    per_layer = [{role.template for role in roles.values() if role.layer == layer} for layer in range(3)]
    assert per_layer[0] == per_layer[1] == per_layer[2] != set()


def test_a_template_leads_back_to_the_name(roles: dict[str, TensorRole]) -> None:
    for name, role in roles.items():
        assert role.name == name
        assert name == (role.template if role.layer is None else layer_name(role.template, role.layer))


def test_every_tensor_of_a_model_has_a_part(roles: dict[str, TensorRole]) -> None:
    assert not [name for name, role in roles.items() if role.part == "other"]
    inside = {role.part for role in roles.values() if role.layer is not None}
    assert inside == {"attention", "mlp", "norm"}
    outside = {role.part for role in roles.values() if role.layer is None}
    assert {"embedding", "norm"} <= outside <= {"embedding", "norm", "head"}


def test_the_parts_of_a_model_are_what_its_modules_are(roles: dict[str, TensorRole]) -> None:
    for name, role in roles.items():
        pieces = name.split(".")
        if role.part == "norm":
            assert "norm" in name or pieces[-2].startswith("ln_")
        elif role.layer is not None:
            module = pieces[pieces.index(str(role.layer)) + 1]
            expected = (
                {"self_attn", "attention", "attn"}
                if role.part == "attention"
                else {"mlp", "block_sparse_moe"}
            )
            assert module in expected


def test_embeddings_come_before_the_layers_and_the_final_norm_and_head_after(
    roles: dict[str, TensorRole],
) -> None:
    before = {name for name, role in roles.items() if before_layers(role)}
    embeddings = {"model.embed_tokens.weight", "gpt_neox.embed_in.weight", "transformer.wte.weight"}
    assert before & embeddings
    assert before <= embeddings | {"transformer.wpe.weight"}


@pytest.mark.parametrize(
    ("name", "container", "part"),
    [
        # Names on the hub that transformers renames when loading.
        ("h.{}.attn.c_attn.weight", "h", "attention"),
        ("h.{}.mlp.c_proj.weight", "h", "mlp"),
        ("h.{}.ln_1.bias", "h", "norm"),
        ("model.layers.{}.block_sparse_moe.experts.3.w1.weight", "model.layers", "mlp"),
        ("model.layers.{}.block_sparse_moe.gate.weight", "model.layers", "mlp"),
        ("model.layers.{}.mlp.shared_expert_gate.weight", "model.layers", "mlp"),
        ("model.layers.{}.attention.wqkv.weight", "model.layers", "attention"),
        ("model.layers.{}.feed_forward.w2.weight", "model.layers", "mlp"),
        ("model.layers.{}.self_attn.q_layernorm.norms.1.weight", "model.layers", "norm"),
        ("model.decoder.layers.{}.fc1.weight", "model.decoder.layers", "mlp"),
        ("model.decoder.layers.{}.self_attn_layer_norm.bias", "model.decoder.layers", "norm"),
        ("model.decoder.layers.{}.final_layer_norm.bias", "model.decoder.layers", "norm"),
        ("transformer.h.{}.self_attention.dense.weight", "transformer.h", "attention"),
        ("transformer.blocks.{}.attn.Wqkv.weight", "transformer.blocks", "attention"),
        ("transformer.blocks.{}.ffn.up_proj.weight", "transformer.blocks", "mlp"),
        ("backbone.layers.{}.mixer.in_proj.weight", "backbone.layers", "other"),
        (
            "model.language_model.layers.{}.self_attn.o_proj.weight",
            "model.language_model.layers",
            "attention",
        ),
    ],
)
def test_a_tensor_of_a_layer_is_recognised(name: str, container: str, part: str) -> None:
    names = [name.replace("{}", str(layer)) for layer in range(12)]
    roles = classify(names)
    assert num_layers(names) == 12
    assert [roles[n].layer for n in names] == list(range(12))
    assert {role.template for role in roles.values()} == {name}
    assert name.startswith(f"{container}.{{}}.")
    assert {role.part for role in roles.values()} == {part}


@pytest.mark.parametrize(
    ("name", "part", "before"),
    [
        ("wte.weight", "embedding", True),
        ("transformer.wpe.weight", "embedding", True),
        ("model.decoder.embed_positions.weight", "embedding", True),
        ("transformer.word_embeddings_layernorm.weight", "norm", True),
        ("model.rotary_emb.inv_freq", "other", True),
        ("model.norm.weight", "norm", False),
        ("model.final_layernorm.bias", "norm", False),
        ("ln_f.weight", "norm", False),
        ("backbone.norm_f.weight", "norm", False),
        ("lm_head.weight", "head", False),
        ("embed_out.weight", "head", False),
        ("score.weight", "head", False),
        ("output.weight", "head", False),
    ],
)
def test_a_tensor_outside_the_layers_is_recognised(name: str, part: str, before: bool) -> None:
    role = classify([name, "model.layers.0.mlp.up_proj.weight"])[name]
    assert (role.layer, role.template, role.part) == (None, name, part)
    assert before_layers(role) is before


def test_a_tensor_of_a_layer_is_never_before_the_layers() -> None:
    assert not before_layers(classify(["model.layers.0.embed.weight"])["model.layers.0.embed.weight"])


def test_the_layers_are_the_container_with_the_most_tensors() -> None:
    audio = [f"audio.blocks.{n}.attn.weight" for n in range(5)]
    text = [f"text.layers.{n}.{part}.weight" for n in range(3) for part in ("attn", "mlp")]
    roles = classify(audio + text)
    assert num_layers(audio + text) == 3
    assert roles["audio.blocks.4.attn.weight"].layer is None


@given(st.permutations([f"{stack}.{n}.w" for stack in "ab" for n in range(3)]))
def test_the_order_of_the_names_does_not_matter(names: list[str]) -> None:
    assert classify(names) == classify(sorted(names))
    assert list(classify(names)) == sorted(names)
    assert num_layers(names) == 3


def test_names_without_numbers_have_no_layers() -> None:
    assert num_layers(["a.weight", "b", "0.weight", "a.7", "model.layers.01.w", "x.4bit.w", ""]) == 0
    assert classify([]) == {}


@pytest.mark.parametrize("numbers", [[1, 2], [0, 2], [0, 1, 999_999]])
def test_a_gap_in_the_numbers_is_an_error(numbers: list[int]) -> None:
    names = [f"model.layers.{n}.w" for n in numbers]
    missing = min(set(range(3)) - set(numbers))
    for function in (classify, num_layers):
        with pytest.raises(
            ValueError, match=rf"'model\.layers' has {len(numbers)} layers .* numbered {missing}"
        ):
            function(names)


def test_braces_in_a_name_survive() -> None:
    role = classify(["a.0.{x}.w"])["a.0.{x}.w"]
    assert layer_name(role.template, 5) == "a.5.{x}.w"


def test_a_saved_index_is_classified_like_its_tensors(tmp_path: Path) -> None:
    model = tiny("Llama").to(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert classify(names) == classify(model.state_dict())


def test_a_stack_is_a_container_with_attention_or_an_mlp() -> None:
    text = [f"model.layers.{n}.{part}.weight" for n in range(3) for part in ("mlp.up_proj", "norm")]
    assert stacks([*text, "projector.0.weight", "projector.2.weight", "norms.0.norm.weight"]) == {
        "model.layers": 3
    }
    tower = [f"vision.blocks.{n}.attn.qkv.weight" for n in range(2)]
    assert stacks([*text, *tower]) == {"model.layers": 3, "vision.blocks": 2}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.attn.bias", (1, 1, 8, 8), True),
        ("gpt_neox.layers.1.attention.bias", (1, 1, 8, 8), True),
        ("gpt_neox.layers.1.attention.masked_bias", (), True),
        ("gpt_neox.layers.1.attention.rotary_emb.inv_freq", (4,), True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("model.layers.0.attention.bias", (8,), False),
        ("h.0.attn.c_attn.bias", (8,), False),
        ("model.layers.0.attention.dense.bias", (8,), False),
    ],
)
def test_constants_are_told_from_weights(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_constant(name, shape) is expected
