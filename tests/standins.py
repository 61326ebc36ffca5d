"""Writes checkpoints of any size that take no room: everything but the weights is real.

Their weight files have a header and a hole: reading them gives zeros, and how much was read can be told from
the pages that the system holds of them. They serve to check what works on headers alone, with models as large
as people have them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reader import SINGLE
from evomerge.checkpoints.shards import TensorSpec, index_of, plan_shards
from tests.tiny import make_tokenizer

MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
"""7,241,732,096 parameters."""

LLAMA_2_7B: dict[str, Any] = {
    **MISTRAL_7B,
    "model_type": "llama",
    "intermediate_size": 11_008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
"""6,738,415,616 parameters."""


def make_standin(
    folder: Path, *, dtype: str = "bfloat16", shard_bytes: int = 5 * 10**9, **config: Any
) -> Path:
    """Write a checkpoint without weights.

    Args:
        folder: The folder to make.
        dtype: Type of its weights, as torch names it.
        shard_bytes: Size of its weight files, at most.
        **config: Its config, as transformers reads it; `model_type` names the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    made.architectures, made.dtype = [type(model).__name__], dtype
    made.save_pretrained(folder)
    tied = set(model._tied_weights_keys or {}) if made.tie_word_embeddings else set()
    specs = [
        TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    ]
    shards = plan_shards(specs, shard_bytes)
    for shard in shards:
        with (folder / shard.filename).open("wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.nbytes)
    if shards[0].filename != SINGLE:
        (folder / f"{SINGLE}.index.json").write_text(json.dumps(index_of(shards)))
    make_tokenizer().save_pretrained(folder)
    return folder


def weights_read(folder: Path) -> int:
    """Bytes of a checkpoint's weight files that the system holds in memory because someone read them."""
    return sum(_resident(file) for file in folder.glob("*.safetensors"))


def _resident(file: Path) -> int:
    """Bytes of a file in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(start, len(mapped), pages):
            raise OSError(ctypes.get_errno(), "mincore")
        return bytes(pages).count(1) * mmap.PAGESIZE
