"""Models of realistic shapes with random weights, in memory and on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint, TensorInfo

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
    # The shapes of SmolLM2-135M and of Llama-3.2-1B.
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
NAMES = ("base", "one", "two", "three")


def config_of(size: str) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **CONFIGS[size],
    }


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    c = CONFIGS[size]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(c["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def weights(size: str, model: int) -> dict[str, Tensor]:
    """Random bfloat16 weights: a common base, changed a little by every model but 0."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000 + model)
    result = {}
    for name, shape in shapes(size).items():
        tensor = torch.randn(shape, generator=shared).mul_(0.05)
        if model:
            tensor.add_(torch.randn(shape, generator=own), alpha=0.002)
        result[name] = tensor.bfloat16()
    return result


class InMemory(Checkpoint):
    """A checkpoint whose tensors were never on disk."""

    def __init__(self, size: str, state: dict[str, Tensor]) -> None:
        infos = {
            name: TensorInfo(
                name=name, file=Path(), dtype="BF16", shape=tuple(tensor.shape), begin=0, end=tensor.nbytes
            )
            for name, tensor in state.items()
        }
        super().__init__(folder=Path(), config=config_of(size), tensors=infos, files=())
        self.state = state

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.state[name]


def in_memory(size: str) -> dict[str, InMemory]:
    """The base and three models."""
    return {name: InMemory(size, weights(size, index)) for index, name in enumerate(NAMES)}


def on_disk(size: str, folder: Path) -> Path:
    """Write the base and three models with a tokenizer; what is there already stays."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for index, name in enumerate(NAMES):
        model = folder / size / name
        if (model / "config.json").exists():
            continue
        model.mkdir(parents=True, exist_ok=True)
        save_file(weights(size, index), model / "model.safetensors", {"format": "pt"})
        words = {f"<{number}>": number for number in range(CONFIGS[size]["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))  # noqa: S106
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
        (model / "config.json").write_text(json.dumps(config_of(size)))
    return folder / size


def num_bytes(size: str) -> int:
    """Bytes of one model's weights in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in shapes(size).values())


def recipe_of(method: str, names: dict[str, str], *, shift: float = 0.0) -> dict[str, Any]:
    """A recipe over all models.

    Args:
        method: The merge method.
        names: base, one, two, three -> how the recipe names it.
        shift: Changes the weights a little, as one candidate differs from the next.
    """
    sources = [names["one"]] if method == "slerp" else [names["one"], names["two"], names["three"]]
    per_model: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    if method in ("linear", "task_arithmetic", "ties", "breadcrumbs_ties", "dare_ties", "della"):
        per_model["weight"] = 0.4 + shift
    if method in ("ties", "breadcrumbs_ties", "dare_ties", "della"):
        per_model["density"] = 0.5 + shift
    if method == "slerp":
        shared["t"] = 0.4 + shift
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name, "parameters": per_model} for name in sources],
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "parameters": shared,
    }
    if method == "linear":
        recipe["models"].append({"model": names["base"], "parameters": per_model})
    else:
        recipe["base_model"] = names["base"]
    return recipe
