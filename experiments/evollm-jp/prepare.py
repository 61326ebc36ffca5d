"""Make checkpoints that evomerge can merge of the two source models that were published as pickles.

WizardMath-7B-V1.1 and Abel-7B-002 are on the Hugging Face hub as `pytorch_model-*.bin` only, which evomerge
does not load, and Abel has 32 tokens more than the others, so that its embedding fits none of them. This script
reads the pickles with `weights_only`, which runs no code in them, rounds to bfloat16, cuts embedding and head to
the vocabulary of Mistral-7B-v0.1, with whose tokenizer the result comes, and writes safetensors.

Run from anywhere; it downloads 43 GB, writes 29 GB, and takes about 20 GB of memory::

    python experiments/evollm-jp/prepare.py [--out DIR]

It writes `DIR/WizardMath-7B-V1.1` and `DIR/Abel-7B-002`, where the experiments look for them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

BASE = "mistralai/Mistral-7B-v0.1"
# The commits that were looked at; later ones change no weights.
SOURCES = {
    "WizardMath-7B-V1.1": ("WizardLMTeam/WizardMath-7B-V1.1", "7b347840e9da16c62c36cd86d693553546a686be"),
    "Abel-7B-002": ("GAIR/Abel-7B-002", "2ca055520b0e4b474a3c727455fb2123c0def61c"),
}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
PER_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row per token."""


def convert(source: Path, base: Path, target: Path) -> None:
    """Write a model in bfloat16, as safetensors, with the base's vocabulary.

    Args:
        source: A folder with `pytorch_model*.bin`.
        base: A folder with the base's tokenizer.
        target: The folder to make.

    Raises:
        ValueError: Up to the base's last token, the model has other tokens than the base.
    """
    tokens, kept = vocabulary(base), vocabulary(source)
    size = max(tokens.values()) + 1
    if {token: index for token, index in kept.items() if index < size} != tokens:
        raise ValueError(f"{source}: its first {size} tokens are not those of {base}")
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob("pytorch_model*.bin"))
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        tensors = {
            name: (tensor[:size] if name in PER_TOKEN else tensor).to(torch.bfloat16).contiguous()
            for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": size, "torch_dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(source / "generation_config.json", target)
    for tokenizer_file in TOKENIZER:
        if (base / tokenizer_file).exists():
            shutil.copy(base / tokenizer_file, target)


def vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id, as a folder's `tokenizer.json` has them."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return {**content["model"]["vocab"], **added}


def main() -> None:
    """Download, convert, say where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    out = parser.parse_args().out
    base = Path(snapshot_download(BASE, allow_patterns=list(TOKENIZER)))
    for name, (repository, revision) in SOURCES.items():
        source = snapshot_download(
            repository, revision=revision, allow_patterns=["*.json", "pytorch_model*.bin"]
        )
        convert(Path(source), base, out / name)
        print(out / name)


if __name__ == "__main__":
    main()
