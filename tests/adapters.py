"""Makes tiny adapters with PEFT, and merges them with it: the oracle of adapters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import WORDS, make_tokenizer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(
    folder: Path,
    model: Path,
    *,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    rows: int = WORDS,
    **config: Any,
) -> Path:
    """Train nothing, but save what training would: a LoRA with random factors, by PEFT.

    Args:
        folder: Where to write it.
        model: The model it is for.
        seed: Of its random numbers.
        dtype: What its factors are stored in.
        rows: Number of tokens, if the model's is changed.
        **config: Of `peft.LoraConfig`.
    """
    peft, generator = _peft(), torch.Generator().manual_seed(seed)
    base = _load(model, torch.float32)
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # PEFT starts from random factors of its own
        if rows != WORDS:
            base.resize_token_embeddings(rows)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
        adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or ".lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
                if dtype is not None:
                    parameter.copy_(parameter.to(dtype))
        adapted.save_pretrained(folder)
    if dtype is not None:
        edit(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    return folder


def by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged model's tensors, as PEFT makes them."""
    peft, base = _peft(), _load(model, "auto")
    rows = {
        tensor.shape[0]
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
        if name.endswith(("embed_tokens.weight", "embed_tokens.base_layer.weight"))
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for count in rows - {WORDS}:
            base.resize_token_embeddings(count)
        merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return dict(merged.state_dict())


def make_gpt2(folder: Path, *, base_class: bool = False, tied: bool = True) -> Path:
    """A random GPT-2, whose layers store their weights as [in, out] and whose head may be its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=WORDS,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    (model.transformer if base_class else model).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
    **config: Any,
) -> Path:
    """Change the tensors of an adapter, or fields of its config."""
    if change is not None:
        file = folder / "adapter_model.safetensors"
        state = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file({name: tensor.contiguous() for name, tensor in change(state).items()}, file)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def _peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    return peft


def _load(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    takes_images = "vision_config" in json.loads((folder / "config.json").read_text())
    kind = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
