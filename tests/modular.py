"""Tiny random models of several modules, made by transformers, and inputs for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.architectures import randomise

WORDS = 48
IMAGE = WORDS - 1
"""The token that stands for a piece of an image."""

TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("Llava", "Mistral3", "Qwen2_5_VL", "T5")


def tiny(name: str) -> Any:
    """A random model; the language models of all but T5 are 3 layers deep, their towers 2."""
    if name == "Mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT))
    if name == "T5":
        sizes = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **sizes,
                num_layers=2,
                num_decoder_layers=3,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            )
        )
    if name == "Qwen2_5_VL":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = {
            "depth": 2,
            "hidden_size": 8,
            "intermediate_size": 12,
            "out_hidden_size": 16,
            "num_heads": 2,
        }
        config = transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config={**vision, "patch_size": 4, "fullatt_block_indexes": [1]},
            image_token_id=IMAGE,
            video_token_id=IMAGE - 1,
            vision_start_token_id=IMAGE - 2,
            vision_end_token_id=IMAGE - 3,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    text = transformers.MistralConfig(**TEXT)
    if name == "Mistral3":
        vision = transformers.PixtralVisionConfig(**TOWER, image_size=16, patch_size=4)
        config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
        return transformers.Mistral3ForConditionalGeneration(config)
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=8, patch_size=4),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def make_family(folder: Path, name: str, *, as_held: bool = False) -> Path:
    """Write `base`, `one` and `two`: a common random base, the others changed a little; float32.

    Args:
        folder: Where.
        name: One of `FAMILIES`, or `Mistral`, the language model of a `Llava`.
        as_held: Name the tensors as transformers holds them, not as it writes them.
    """
    for seed, child in enumerate(("base", "one", "two")):
        model = tiny(name)
        randomise(model, seed)
        model.save_pretrained(folder / child)
        if as_held:
            state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
            save_file(state, folder / child / "model.safetensors", {"format": "pt"})
    return folder


def add_processor(model: Path) -> None:
    """Give a model the files that say how images are prepared."""
    processor = transformers.CLIPImageProcessor(crop_size=8, size={"shortest_edge": 8})
    processor.save_pretrained(model)
    shutil.copy(model / "preprocessor_config.json", model / "processor_config.json")


def load(folder: Path) -> Any:
    """A model, from a checkpoint in which transformers finds all tensors and no others."""
    config = transformers.AutoConfig.from_pretrained(folder)
    made = getattr(transformers, config.architectures[0])
    model, info = made.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> Tensor:
    """What a model makes of a text, with an image in it if it takes one."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, WORDS - 8, (1, 12), generator=generator)
    inputs: dict[str, Tensor] = {}
    match model.config.model_type:
        case "t5":
            inputs["decoder_input_ids"] = words.flip(1)
        case "qwen2_5_vl":
            inputs["pixel_values"] = torch.randn(4, 3 * 2 * 4 * 4, generator=generator)
            inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]])
            inputs["mm_token_type_ids"] = (torch.arange(12) == 2).long()[None]
            words[0, 2] = IMAGE
        case "mistral3":
            inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
            inputs["image_sizes"] = torch.tensor([[16, 16]])
            words[0, 2:6] = IMAGE
        case "llava":
            inputs["pixel_values"] = torch.randn(1, 3, 8, 8, generator=generator)
            words[0, 2:6] = IMAGE
    with torch.no_grad():
        found: Tensor = model(input_ids=words, **inputs).logits
    assert found.isfinite().all()
    return found
