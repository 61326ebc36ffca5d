"""Embedding and head: tied ones stay one tensor, longer ones change the vocabulary with their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.adapted import adapted
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from tests.adapters import by_peft, edit, make_adapter, make_gpt2
from tests.tiny import WORDS, make_model, make_tokenizer

EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untied"
    return make_model(folder, seed=0, dtype="float32", num_hidden_layers=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tied"
    return make_model(folder, seed=0, num_hidden_layers=2, tie_word_embeddings=True)


def plain(folder: Path, model: Path) -> Path:
    return make_adapter(folder, model, target_modules=["q_proj"])


def add(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    return edit(folder, lambda state: {**state, **tensors})


def rows(count: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((count, 32), value)


def merged(model: Path, adapter: Path) -> Checkpoint:
    return Checkpoint.open(adapted(model, adapter))


# Tied.


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_lora_of_a_tied_embedding_or_head_is_refused(tmp_path: Path, tied: Path, target: str) -> None:
    folder = make_adapter(tmp_path / "adapter", tied, target_modules=["q_proj", target])
    with pytest.raises(CheckpointError, match=r"expected no LoRA of the embedding or the head, .*one tensor"):
        adapted(tied, folder)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_new_embedding_or_head_alone_is_refused_for_tied_models(
    tmp_path: Path, tied: Path, name: str
) -> None:
    folder = add(plain(tmp_path / "adapter", tied), {name: rows(WORDS)})
    with pytest.raises(CheckpointError, match=f"expected the same values .* found only '{name}'; the merged"):
        adapted(tied, folder)


def test_different_values_for_what_is_tied_are_refused(tmp_path: Path, tied: Path) -> None:
    folder = add(plain(tmp_path / "adapter", tied), {EMBEDDING: rows(WORDS), HEAD: rows(WORDS, 0.6)})
    with pytest.raises(CheckpointError, match=r"expected the same values .* found other values in"):
        adapted(tied, folder)


def test_the_same_values_for_what_is_tied_replace_the_embedding(tmp_path: Path, tied: Path) -> None:
    folder = add(plain(tmp_path / "adapter", tied), {EMBEDDING: rows(WORDS), HEAD: rows(WORDS)})
    found = merged(tied, folder)
    assert found.tensor("model.embed_tokens.weight").equal(rows(WORDS).bfloat16())
    assert set(found.tensors) == set(Checkpoint.open(tied).tensors)


def test_an_embedding_trained_tied_may_come_alone(tmp_path: Path, tied: Path) -> None:
    folder = add(plain(tmp_path / "adapter", tied), {EMBEDDING: rows(WORDS)})
    found = merged(tied, edit(folder, ensure_weight_tying=True))
    assert found.tensor("model.embed_tokens.weight").equal(rows(WORDS).bfloat16())


def test_a_head_that_is_stored_beside_its_embedding_changes_with_it(tmp_path: Path, tied: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    state = load_file(tied / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, model / "model.safetensors")
    config = json.loads((tied / "config.json").read_text())
    folder = add(plain(tmp_path / "adapter", tied), {EMBEDDING: rows(WORDS), HEAD: rows(WORDS)})
    for flag in (True, None):
        config["tie_word_embeddings"] = flag
        (model / "config.json").write_text(json.dumps(config))
        found = merged(model, folder)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert found.tensor(name).equal(rows(WORDS).bfloat16())
        with pytest.raises(CheckpointError, match="expected no LoRA of the embedding"):
            adapted(model, make_adapter(tmp_path / f"lora{flag}", tied, target_modules=["lm_head"]))


def test_a_model_that_does_not_say_so_is_tied_if_it_stores_no_head(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (model / "config.json").write_text(json.dumps(config))
    folder = make_adapter(tmp_path / "adapter", model, target_modules=["wte"])
    with pytest.raises(CheckpointError, match="expected no LoRA of the embedding"):
        adapted(model, edit(folder, fan_in_fan_out=True))


# More tokens.


def tokenizer(folder: Path, *tokens: str) -> Path:
    added = make_tokenizer()
    added.add_tokens(list(tokens))
    added.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_with_tokens_of_its_own_brings_vocabulary_and_tokenizer(
    tmp_path: Path, untied: Path, targets: list[str]
) -> None:
    folder = make_adapter(tmp_path / "adapter", untied, rows=WORDS + 2, target_modules=targets)
    tokenizer(folder, "<think>", "</think>")
    found = merged(untied, folder)
    expected = by_peft(untied, folder)
    for name in found.tensors:
        assert found.tensor(name).equal(expected[name])
    assert found.tensors["lm_head.weight"].shape == (WORDS + 2, 32)
    assert found.config == {**Checkpoint.open(untied).config, "vocab_size": WORDS + 2}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(found.folder)
    assert loaded("<think>")["input_ids"] == [WORDS]
    ids = torch.tensor([[WORDS]])
    assert AutoModelForCausalLM.from_pretrained(found.folder)(ids).logits.shape == (1, 1, WORDS + 2)


def test_the_same_for_tied_models(tmp_path: Path, tied: Path) -> None:
    folder = tokenizer(
        make_adapter(tmp_path / "adapter", tied, rows=WORDS + 2, target_modules=["q_proj"]), "<a>"
    )
    found = merged(tied, folder)
    assert found.tensor("model.embed_tokens.weight").equal(by_peft(tied, folder)["model.embed_tokens.weight"])
    assert (found.config["vocab_size"], "lm_head.weight" in found.tensors) == (WORDS + 2, False)


def test_the_tokenizer_stays_the_models_when_the_adapter_has_no_embedding(
    tmp_path: Path, untied: Path
) -> None:
    folder = tokenizer(plain(tmp_path / "adapter", untied), "<pad2>")
    found = merged(untied, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (found.folder / name).read_bytes() == (untied / name).read_bytes()


def test_the_tokenizer_stays_the_models_when_the_adapter_has_none(tmp_path: Path, untied: Path) -> None:
    folder = add(plain(tmp_path / "adapter", untied), {EMBEDDING: rows(70), HEAD: rows(70)})
    found = merged(untied, folder)
    assert (found.folder / "tokenizer.json").read_bytes() == (untied / "tokenizer.json").read_bytes()
    assert found.config["vocab_size"] == 70


@pytest.mark.parametrize("count", [WORDS, WORDS - 1])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path, untied: Path, count: int) -> None:
    folder = add(plain(tmp_path / "adapter", untied), {EMBEDDING: rows(count), HEAD: rows(count)})
    if count == WORDS:
        tokenizer(folder, "<new>")
    last = WORDS if count == WORDS else WORDS - 1
    with pytest.raises(
        CheckpointError, match=f"has ids up to {last}, but the embedding .* has {count} rows; put"
    ):
        adapted(untied, folder)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_longer_embedding_without_its_head_is_refused(tmp_path: Path, untied: Path, name: str) -> None:
    folder = add(plain(tmp_path / "adapter", untied), {name: rows(70)})
    with pytest.raises(
        CheckpointError, match=f"'{name}': expected 64 rows, as '.*' will have, found 70; save"
    ):
        adapted(untied, folder)


def test_rows_of_another_width_are_refused(tmp_path: Path, untied: Path) -> None:
    folder = add(plain(tmp_path / "adapter", untied), {EMBEDDING: torch.zeros(WORDS, 33)})
    with pytest.raises(CheckpointError, match=r"expected shape \[64, 32\], as .*, found \[64, 33\]"):
        adapted(untied, folder)


def test_the_final_norm_has_no_rows_to_add(tmp_path: Path, untied: Path) -> None:
    folder = add(plain(tmp_path / "adapter", untied), {"base_model.model.model.norm.weight": torch.zeros(33)})
    with pytest.raises(CheckpointError, match=r"norm\.weight': expected shape \[32\], as .*, found \[33\]"):
        adapted(untied, folder)
