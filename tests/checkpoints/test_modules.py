"""Modules are told from the names of tensors."""

from __future__ import annotations

import pytest

from evomerge.checkpoints.modules import find_modules, shared_template

LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight")


def stack(container: str, count: int = 2) -> list[str]:
    return [f"{container}.{layer}.{rest}" for layer in range(count) for rest in LAYER]


def modules(*names: str) -> dict[str, list[str]]:
    """Module -> its tensors outside its layers, and its layers as `container x count`."""
    found = {}
    for module, roles in find_modules(names).items():
        outside = sorted(role.name for role in roles.values() if role.layer is None)
        inside = [role for role in roles.values() if role.layer is not None]
        containers = sorted({role.template.partition(".{}.")[0] for role in inside})
        count = len({role.layer for role in inside})
        found[module] = [*outside, *(f"{container} x {count}" for container in containers)]
    return found


def test_one_stack_of_layers_is_one_module() -> None:
    names = ("model.embed_tokens.weight", *stack("model.layers"), "model.norm.weight", "lm_head.weight")
    assert modules(*names) == {
        "default": ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers x 2"]
    }


@pytest.mark.parametrize(
    ("text", "tower", "projector", "head"),
    [
        # As LLaVA is stored, and as transformers 5 holds it.
        (
            "language_model.model",
            "vision_tower.vision_model",
            "multi_modal_projector",
            "language_model.lm_head",
        ),
        ("model.language_model", "model.vision_tower", "model.multi_modal_projector", "lm_head"),
        # The LLaVA repository's own format.
        ("model", "model.vision_tower.vision_tower.vision_model", "model.multi_modal_projector", "lm_head"),
    ],
)
def test_a_llava_has_three_modules_in_every_format(text: str, tower: str, projector: str, head: str) -> None:
    found = modules(
        f"{text}.embed_tokens.weight",
        *stack(f"{text}.layers", 3),
        f"{text}.norm.weight",
        f"{head}.weight",
        f"{projector}.linear_1.weight",
        f"{projector}.norm.weight",
        f"{tower}.embeddings.patch_embedding.weight",
        *stack(f"{tower}.encoder.layers"),
        f"{tower}.post_layernorm.weight",
    )
    assert found == {
        "text_decoder": [
            *sorted([f"{head}.weight", f"{text}.embed_tokens.weight", f"{text}.norm.weight"]),
            f"{text}.layers x 3",
        ],
        "multi_modal_projector": [f"{projector}.linear_1.weight", f"{projector}.norm.weight"],
        "vision_tower": [
            f"{tower}.embeddings.patch_embedding.weight",
            f"{tower}.post_layernorm.weight",
            f"{tower}.encoder.layers x 2",
        ],
    }


def test_what_merges_the_patches_of_a_qwen_is_its_projector() -> None:
    found = modules(
        "model.embed_tokens.weight",
        *stack("model.layers"),
        "lm_head.weight",
        "visual.patch_embed.proj.weight",
        *(f"visual.blocks.{layer}.attn.qkv.weight" for layer in range(3)),
        "visual.merger.mlp.0.weight",
        "visual.merger.mlp.2.weight",
        "visual.deepstack_merger_list.1.norm.weight",
    )
    assert found == {
        "text_decoder": ["lm_head.weight", "model.embed_tokens.weight", "model.layers x 2"],
        "vision_tower": ["visual.patch_embed.proj.weight", "visual.blocks x 3"],
        "multi_modal_projector": [
            "visual.deepstack_merger_list.1.norm.weight",
            "visual.merger.mlp.0.weight",
            "visual.merger.mlp.2.weight",
        ],
    }


def test_other_modules_keep_the_names_of_their_tensors() -> None:
    found = modules(
        *stack("model.text_model.layers"),
        "model.connector.proj.weight",
        "model.image_newline",
        *stack("model.vision_model.encoder.layers"),
        *stack("model.audio_tower.layers"),
        "lm_head.weight",
    )
    assert sorted(found) == ["audio_tower", "connector", "image_newline", "text_decoder", "vision_model"]
    assert found["text_decoder"] == ["lm_head.weight", "model.text_model.layers x 2"]


def test_an_encoder_and_its_decoder_share_an_embedding_and_a_head() -> None:
    found = modules("shared.weight", *stack("encoder.block"), *stack("decoder.block", 3), "lm_head.weight")
    assert found == {
        "decoder": ["decoder.block x 3"],
        "encoder": ["encoder.block x 2"],
        "shared": ["lm_head.weight", "shared.weight"],
    }
    whisper = modules(
        *stack("model.encoder.layers"), *stack("model.decoder.layers"), "model.decoder.norm.weight"
    )
    assert whisper["decoder"] == ["model.decoder.norm.weight", "model.decoder.layers x 2"]


def test_the_larger_of_two_stacks_in_a_module_is_its_layers() -> None:
    found = modules(
        *stack("language_model.model.layers"),
        *stack("vision_model.transformer.layers", 3),
        *stack("vision_model.global_transformer.layers", 1),
    )
    assert found["vision_model"][-1] == "vision_model.transformer.layers x 3"
    assert len(found["vision_model"]) == 3


def test_two_stacks_that_may_both_be_the_language_model_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"for the module text_decoder, found several: 'model\.blocks', 'model\.layers'"
    ):
        modules(*stack("model.layers"), *stack("model.blocks"))


def test_layers_numbered_with_a_gap_are_refused_in_every_module() -> None:
    tower = [name for name in stack("vision_tower.layers", 4) if ".1." not in name]
    with pytest.raises(ValueError, match=r"'vision_tower\.layers' has 3 layers up to 3, but none numbered 1"):
        modules(*stack("language_model.layers", 9), *tower)


@pytest.mark.parametrize(
    ("module", "template", "expected"),
    [
        ("text_decoder", "language_model.model.layers.{}.mlp.weight", "model.layers.{}.mlp.weight"),
        ("text_decoder", "model.language_model.layers.{}.mlp.weight", "model.layers.{}.mlp.weight"),
        ("text_decoder", "model.layers.{}.mlp.weight", "model.layers.{}.mlp.weight"),
        ("text_decoder", "language_model.lm_head.weight", "lm_head.weight"),
        ("text_decoder", "lm_head.weight", "lm_head.weight"),
        ("vision_tower", "model.vision_tower.encoder.layers.{}.w", "vision_tower.encoder.layers.{}.w"),
        ("vision_tower", "vision_tower.vision_model.encoder.layers.{}.w", "vision_tower.encoder.layers.{}.w"),
        ("vision_model", "vision_model.model.layers.{}.w", "vision_model.model.layers.{}.w"),
        (
            "multi_modal_projector",
            "model.multi_modal_projector.linear_1.w",
            "multi_modal_projector.linear_1.w",
        ),
        ("default", "language_model.model.norm.weight", "language_model.model.norm.weight"),
    ],
)
def test_a_tensor_has_one_template_however_models_wrap_it(module: str, template: str, expected: str) -> None:
    assert shared_template(module, template) == expected
