"""The parts of decoders are found from names, and what is no decoder is refused with what was found."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from safetensors import safe_open

from evomerge.checkpoints.decoder import find_branches, find_decoder
from tests.architectures import MODELS, tiny

LAYER = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

# Per architecture: the modules that write, and the norms before and after each branch; {} stands for experts.
SEQUENTIAL = {
    "attention": (("self_attn.o_proj",), "input_layernorm", None),
    "mlp": (("mlp.down_proj",), "post_attention_layernorm", None),
}
FOUR_NORMS = {
    "attention": (("self_attn.o_proj",), "input_layernorm", "post_attention_layernorm"),
    "mlp": (("mlp.down_proj",), "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
BRANCHES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "StableLm"), SEQUENTIAL),
    **dict.fromkeys(("Gemma2", "Gemma3Text"), FOUR_NORMS),
    "Olmo2": {
        "attention": (("self_attn.o_proj",), None, "post_attention_layernorm"),
        "mlp": (("mlp.down_proj",), None, "post_feedforward_layernorm"),
    },
    "Cohere": {
        "attention": (("self_attn.o_proj",), "input_layernorm", None),
        "mlp": (("mlp.down_proj",), "input_layernorm", None),
    },
    "GPTNeoX": {
        "attention": (("attention.dense",), "input_layernorm", None),
        "mlp": (("mlp.dense_4h_to_h",), "post_attention_layernorm", None),
    },
    "GPT2": {"attention": (("attn.c_proj",), "ln_1", None), "mlp": (("mlp.c_proj",), "ln_2", None)},
    "Mixtral": SEQUENTIAL
    | {
        "mlp": (
            tuple(f"block_sparse_moe.experts.{n}.w2" for n in range(4)),
            "post_attention_layernorm",
            None,
        )
    },
    "Qwen3Moe": SEQUENTIAL
    | {"mlp": (tuple(f"mlp.experts.{n}.down_proj" for n in range(4)), "post_attention_layernorm", None)},
}


READERS = {
    "Olmo2": {
        "attention": ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    }
}


def names_of(*layer: str, count: int = 2, outside: tuple[str, ...] = OUTSIDE) -> list[str]:
    return [f"model.layers.{n}.{rest}" for n in range(count) for rest in layer] + list(outside)


@pytest.fixture(scope="module", params=MODELS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[str], dict[str, Any]]:
    """Architecture, names of the tensors and config, as saved by transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(folder)
    with safe_open(str(folder / "model.safetensors"), framework="pt") as handle:
        names = list(handle.keys())
    return request.param, names, json.loads((folder / "config.json").read_text())


def test_the_branches_of_every_architecture_are_found(saved: tuple[str, list[str], dict[str, Any]]) -> None:
    name, names, _ = saved
    layers = find_branches(names)
    assert len(layers) == 3
    container = (
        "transformer.h" if name == "GPT2" else "gpt_neox.layers" if name == "GPTNeoX" else "model.layers"
    )
    for number, layer in enumerate(layers):
        for part, branch in (("attention", layer.attention), ("mlp", layer.mlp)):
            writers, before, after = BRANCHES[name][part]
            readers = READERS.get(name, {}).get(part, ())
            assert branch.readers == tuple(f"{container}.{number}.{module}.weight" for module in readers)
            for modules, found in (
                (writers, branch.writers),
                ((before,), branch.input_norm),
                ((after,), branch.post_norm),
            ):
                wanted = [
                    f"{container}.{number}.{module}.{kind}"
                    for module in modules
                    for kind in ("bias", "weight")
                ]
                assert list(found) == sorted(set(wanted) & set(names))


def test_the_parts_outside_the_layers_are_found(saved: tuple[str, list[str], dict[str, Any]]) -> None:
    name, names, config = saved
    decoder = find_decoder(names, config)
    tied = name in {"Qwen2", "Gemma2", "Gemma3Text", "Cohere", "GPT2"}
    head = () if tied else ("embed_out.weight",) if name == "GPTNeoX" else ("lm_head.weight",)
    assert (decoder.num_layers, decoder.tied, decoder.head) == (3, tied, head)
    token, position, norm = {
        "GPT2": ("transformer.wte.weight", ("transformer.wpe.weight",), "transformer.ln_f"),
        "GPTNeoX": ("gpt_neox.embed_in.weight", (), "gpt_neox.final_layer_norm"),
    }.get(name, ("model.embed_tokens.weight", (), "model.norm"))
    assert decoder.token_embeddings == (token,)
    assert decoder.position_embeddings == position
    assert decoder.embedding_norm == ()
    assert set(decoder.final_norm) == {f"{norm}.weight", f"{norm}.bias"} & set(names)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        # input and post-norm of attention, then of the MLP
        (("ln_attn", "ln_mlp"), ("ln_attn", None, "ln_mlp", None)),
        (("attention_norm", "ffn_norm"), ("attention_norm", None, "ffn_norm", None)),
        (
            ("self_attn_layer_norm", "final_layer_norm"),
            ("self_attn_layer_norm", None, "final_layer_norm", None),
        ),
        (("ln_1",), ("ln_1", None, "ln_1", None)),
        (("norm_1", "norm_2"), ("norm_1", None, "norm_2", None)),
        (("operator_norm", "ffn_norm"), ("operator_norm", None, "ffn_norm", None)),
        (
            ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
            ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        ),
        (
            ("input_layernorm", "post_feedforward_layernorm"),
            ("input_layernorm", None, None, "post_feedforward_layernorm"),
        ),
        ((), (None, None, None, None)),
    ],
)
def test_norms_of_other_architectures_find_their_place(
    norms: tuple[str, ...], expected: tuple[str | None, ...]
) -> None:
    inner = ("self_attn.q_norm.weight", "mlp.norm.weight")
    for layer in find_branches(names_of(*LAYER, *inner, *(f"{norm}.weight" for norm in norms))):
        found = [
            [name.split(".")[3] for name in names]
            for branch in (layer.attention, layer.mlp)
            for names in (branch.input_norm, branch.post_norm)
        ]
        assert found == [[norm] if norm else [] for norm in expected]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("attn.out_proj.weight", "attention"),
        ("self_attention.dense.bias", "attention"),
        ("attention.wo.weight", "attention"),
        ("linear_attn.out_proj.weight", "attention"),
        ("fc2.bias", "mlp"),
        ("mlp.fc_out.weight", "mlp"),
        ("feed_forward.w2.weight", "mlp"),
        ("mlp.shared_expert.down_proj.weight", "mlp"),
        ("mlp.experts.down_proj", "mlp"),
        ("mlp.experts.down_proj_bias", "mlp"),
        ("block_sparse_moe.output_linear.weight", "mlp"),
    ],
)
def test_writers_of_other_architectures_are_found(name: str, part: str) -> None:
    layer = find_branches(names_of(*LAYER, name))[1]
    others = {f"model.layers.1.{own}" for own in (LAYER[1], LAYER[3])}
    assert {*layer.attention.writers, *layer.mlp.writers} == others | {f"model.layers.1.{name}"}
    assert f"model.layers.1.{name}" in getattr(layer, part).writers


POST_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def test_all_that_reads_the_stream_without_a_norm_is_found_but_no_bias() -> None:
    experts = [f"mlp.experts.{n}.{kind}_proj.weight" for n in range(2) for kind in ("gate", "up", "down")]
    inside = (
        "self_attn.q_proj.bias",
        "self_attn.q_norm.weight",
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj_bias",
    )
    for number, layer in enumerate(find_branches(names_of(*LAYER, *POST_NORMS, *inside, *experts))):
        read = (*layer.attention.readers, *layer.mlp.readers)
        assert [name.removeprefix(f"model.layers.{number}.") for name in read] == [
            "self_attn.q_proj.weight",
            *(name for name in experts if "down" not in name),
            "mlp.gate.weight",
            "mlp.up_proj.weight",
        ]


@pytest.mark.parametrize("norms", [(), NORMS, ("ln_1.weight",)])
def test_what_a_norm_may_come_before_reads_no_stream(norms: tuple[str, ...]) -> None:
    for layer in find_branches(names_of(*LAYER, *norms)):
        assert (layer.attention.readers, layer.mlp.readers) == ((), ())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            names_of(*LAYER, *POST_NORMS, "self_attn.kv_b_proj.weight"),
            "layer 0: no norm comes before the attention branch, .* told: model.layers.0.self_attn.kv_b_proj",
        ),
        (
            names_of(LAYER[0], *LAYER[2:]),
            "layer 0: expected the matrix through which its attention branch .* such as o_proj or dense; "
            "found model.layers.0.self_attn.q_proj.weight",
        ),
        (names_of("mixer.in_proj.weight", "mixer.A_log"), "layer 0: .*; found model.layers.0.mixer.A_log"),
        (
            names_of(*LAYER, *NORMS, "odd_norm.weight"),
            "layer 0: .* cannot tell the place of 'odd_norm' among input_layernorm, odd_norm, post_attention",
        ),
        (names_of(*LAYER, "ffn_norm.weight", "mlp_norm.weight"), "cannot tell the place of 'mlp_norm'"),
    ],
)
def test_a_branch_that_cannot_be_told_is_refused_with_what_was_found(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_branches(names)


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (names_of(*LAYER), {"is_encoder_decoder": True}, "is_encoder_decoder: true"),
        (
            [*names_of(*LAYER), "vision.blocks.0.attn.qkv.weight", "vision.blocks.1.attn.qkv.weight"],
            {},
            "found several: 'model.layers' of 2, 'vision.blocks' of 2",
        ),
        (names_of(*LAYER, "encoder_attn.q_proj.weight"), {}, "found model.layers.0.encoder_attn.q_proj"),
        (names_of(*LAYER, "crossattention.c_attn.weight"), {}, "found model.layers.0.crossattention.c_attn"),
        (list(OUTSIDE), {}, "no numbered layers .*; the tensors are lm_head.weight, model.embed_tokens"),
        (names_of(*LAYER), {"num_hidden_layers": 3}, "says num_hidden_layers: 3, but the tensors make 2"),
        (names_of(*LAYER), {"n_layer": 1}, "says n_layer: 1"),
        (
            names_of(*LAYER),
            {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 4}},
            "says num_hidden_layers: 4",
        ),
        (
            names_of(*LAYER, outside=("lm_head.weight", "model.norm.weight", "model.embed_positions.weight")),
            {},
            "no token embedding; outside the layers there are lm_head.weight, model.embed_positions.weight",
        ),
        (
            names_of(*LAYER, outside=OUTSIDE[:2]),
            {"tie_word_embeddings": False},
            "found no output head; outside the layers there are model.embed_tokens.weight, model.norm",
        ),
        (names_of(*LAYER)[4:], {}, r"numbered from 0 without a gap"),
    ],
)
def test_what_is_no_decoder_is_refused_with_what_was_found(
    names: list[str], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_decoder(names, config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 2},
        {"text_config": {"num_hidden_layers": 2}},
        {"num_hidden_layers": 5, "text_config": {"num_hidden_layers": 2}},
        {"num_layers": 2, "num_hidden_layers": 2},
    ],
)
def test_a_config_may_state_its_layers_in_any_known_place(config: dict[str, Any]) -> None:
    assert find_decoder(names_of(*LAYER), config).num_layers == 2


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({}, False),
    ],
)
def test_a_stored_head_is_tied_if_the_config_says_so(config: dict[str, Any], tied: bool) -> None:
    decoder = find_decoder(names_of(*LAYER), config)
    assert (decoder.head, decoder.tied) == (("lm_head.weight",), tied)


def test_the_norm_of_the_embedding_is_not_the_final_one() -> None:
    outside = ("word_embeddings.weight", "word_embeddings_layernorm.weight", "ln_f.bias", "ln_f.weight")
    decoder = find_decoder(names_of(*LAYER, outside=outside), {})
    assert decoder.token_embeddings == ("word_embeddings.weight",)
    assert decoder.embedding_norm == ("word_embeddings_layernorm.weight",)
    assert decoder.final_norm == ("ln_f.bias", "ln_f.weight")


def test_messages_list_few_names() -> None:
    names = [f"part{n}.weight" for n in range(50)]
    with pytest.raises(ValueError, match=re.escape("and 42 more")):
        find_decoder(names, {})
