"""Vocabularies are read from the files that tokenizers really have, and differences told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from evomerge.checkpoints.tokenizer import difference, same_vocabulary, tokenizer_files, vocabulary
from evomerge.errors import CheckpointError

VOCAB = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}


def folder(path: Path, **files: Any) -> Path:
    """A folder with JSON files; `tokenizer=...` is `tokenizer.json`."""
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def simple(path: Path, vocab: dict[str, int]) -> Path:
    return folder(path, vocab=vocab)


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.BPE(vocab=VOCAB, merges=[("a", "b")], unk_token="<unk>"),
        lambda: models.WordLevel(vocab=VOCAB, unk_token="<unk>"),
        lambda: models.WordPiece(vocab=VOCAB, unk_token="<unk>"),
        lambda: models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -0.5)], 0, False),
    ],
    ids=["BPE", "WordLevel", "WordPiece", "Unigram"],
)
def test_the_vocabulary_of_a_saved_tokenizer_is_the_tokenizers_own(build: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(build())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["extra"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    assert vocabulary(tmp_path) == tokenizer.get_vocab(with_added_tokens=True)
    assert len(vocabulary(tmp_path) or {}) == 7


def test_a_tokenizer_without_tokenizer_json_is_read_from_its_older_files(tmp_path: Path) -> None:
    assert vocabulary(folder(tmp_path / "a", vocab=VOCAB)) == VOCAB
    assert vocabulary(folder(tmp_path / "b", vocab=VOCAB, added_tokens={"<pad>": 4})) == {**VOCAB, "<pad>": 4}


def test_tokenizer_json_wins_over_the_older_files(tmp_path: Path) -> None:
    assert vocabulary(folder(tmp_path / "a", tokenizer={"model": {"vocab": {"x": 0}}}, vocab=VOCAB)) == {
        "x": 0
    }


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": None},
        {"model": {"vocab": 3}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": ["a"]}},
        {"model": {"vocab": {}}, "added_tokens": {"a": 1}},
        {"model": {"vocab": {}}, "added_tokens": ["a"]},
        {"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]},
    ],
)
def test_a_form_that_is_not_known_gives_no_vocabulary(content: Any, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", tokenizer=content)
    assert vocabulary(path) is None
    assert same_vocabulary(path, simple(tmp_path / "b", VOCAB)) is None
    assert (
        difference(simple(tmp_path / "c", VOCAB), path)
        == f"the vocabulary of {path} cannot be read from its files"
    )


def test_a_folder_without_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert vocabulary(tmp_path) is None
    assert tokenizer_files(tmp_path) == []


def test_a_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "a": 1}}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the file has the key 'a' twice"):
        vocabulary(tmp_path)


def test_the_files_of_a_tokenizer_are_listed_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"]
    for name in [*reversed(names), "config.json", "model.safetensors"]:
        (tmp_path / name).touch()
    assert [path.name for path in tokenizer_files(tmp_path)] == names


def test_a_tokenizer_file_that_links_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    path = folder(tmp_path / "a")
    (path / "tokenizer.json").symlink_to(tmp_path / "secret")
    for function in (tokenizer_files, vocabulary):
        with pytest.raises(CheckpointError, match="outside the model's folder"):
            function(path)


def test_equal_vocabularies_are_equal_in_any_order(tmp_path: Path) -> None:
    a = simple(tmp_path / "a", VOCAB)
    b = simple(tmp_path / "b", dict(reversed(VOCAB.items())))
    assert same_vocabulary(a, b) is True
    assert difference(a, b) == "both number the same 4 tokens alike"


def test_a_difference_counts_each_kind_and_gives_up_to_three_examples(tmp_path: Path) -> None:
    a = simple(tmp_path / "a", {"s": 0, "t": 1, "v": 2, "w": 3, "x": 4, "y": 5})
    b = simple(tmp_path / "b", {"s": 0, "v": 1, "t": 2, "z": 3})
    assert same_vocabulary(a, b) is False
    assert difference(a, b) == (
        f"3 tokens ('w' = 3, 'x' = 4, 'y' = 5) only in {a}; 1 token ('z' = 3) only in {b}; "
        "2 tokens ('t' = 1 and 2, 'v' = 2 and 1) with another id"
    )
    c = simple(tmp_path / "c", {})
    assert difference(a, c) == f"6 tokens ('s' = 0, 't' = 1, 'v' = 2, ...) only in {a}"
