"""Tiny random models of many architectures, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = 48
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A window shorter than the tests' texts tells layers with one from those without.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": False},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "Phi3": {},
    "Olmo2": {},
    "StableLm": {"qk_layernorm": True},
    "Cohere": {"use_qk_norm": True},
    "GPTNeoX": {},
    "GPT2": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
}


def tiny(name: str, **config: Any) -> Any:
    """A random model, 3 layers deep unless the config says otherwise."""
    settings = {**SIZES, **MODELS[name], **config}
    if name == "GPT2":
        settings = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, **config}
        settings |= {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    made = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(made)


def randomise(model: Any, seed: int) -> None:
    """Give a model the common random weights; for a seed other than 0 with small random changes of its own."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=shared))
            if seed:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=own))


def make_family(folder: Path, name: str, **config: Any) -> Path:
    """Write `base`, `one` and `two`: a common random base, the others changed a little; float32."""
    for seed, child in enumerate(("base", "one", "two")):
        model = tiny(name, **config)
        randomise(model, seed)
        model.save_pretrained(folder / child)
    return folder
