"""Makes tiny random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("base", "one", "two", "three")
WORDS = 64


def make_zoo(folder: Path, *, dtype: str = "bfloat16", **config: Any) -> Path:
    """Write `base`, `one`, `two` and `three` into a folder; see `conftest.tiny_zoo`."""
    for seed, name in enumerate(NAMES):
        make_model(folder / name, seed=seed, dtype=dtype, **config)
    return folder


def make_model(folder: Path, *, seed: int, dtype: str = "bfloat16", **config: Any) -> Path:
    """Write one random Llama checkpoint: a common base, changed a little by every seed but 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=shared))
            if seed:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=own))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """A tokenizer of single characters: the lower-case letters, digits, some signs, and fillers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789+-=?:. \n"]
    characters += [f"<{index}>" for index in range(WORDS - len(characters))]
    words = {text: index for index, text in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: 2, until: [" "]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

EXPERIMENT = """\
name: tiny
base_model: {zoo}/base
models:
  - {zoo}/one
  - {zoo}/two
search_space:
  type: parameter
  merge_method: task_arithmetic
  parameters:
    weight: {{low: 0.0, high: 1.0}}
objectives:
  - {{task: letters, metric: exact_match}}
search: {{algorithm: cma-es, evaluations: 6, seed: 1, population: 4}}
evaluation:
  batch_size: 8
  holdout: 0.25
  include_path: [tasks]
workers: {{backend: inline}}
finish: {{baseline_scales: [0.5]}}
"""


def make_task(folder: Path, name: str = "letters", *, count: int = 16) -> Path:
    """Write an lm-eval task that asks a model to echo a letter, with its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
    letters = "abcdefghijklmnopqrstuvwxyz"
    documents = [{"question": f"{letters[i % 26]}{i % 10}=", "answer": letters[i % 26]} for i in range(count)]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def make_experiment(folder: Path, zoo: Path, text: str = EXPERIMENT) -> Path:
    """Write an experiment over a tiny zoo, with its task in `tasks/`."""
    make_task(folder / "tasks")
    file = folder / "experiment.yml"
    file.write_text(text.format(zoo=zoo), encoding="utf-8")
    return file
