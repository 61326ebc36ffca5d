"""The chat template that a recipe asks for is the one the merged model has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evomerge.checkpoints.chat_template import TEMPLATES
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import ConfigurationError
from evomerge.merge.vocabulary import align_vocabularies
from evomerge.recipe import Recipe
from tests.merge.zoo import models, recipe

MERGE = "models: [{model: $one}, {model: $two}, {model: $three}]\nbase_model: $base\nmerge_method: task_arithmetic\n"
NAMES = ("base", "one", "two", "three")


@pytest.fixture
def zoo(tiny_zoo: Path, tmp_path: Path) -> Path:
    for name in NAMES:
        shutil.copytree(tiny_zoo / name, tmp_path / name)
    return tmp_path


def put(zoo: Path, **templates: str) -> None:
    for name, text in templates.items():
        (zoo / name / "chat_template.jinja").write_text(text)


def written(wanted: Recipe, out: Path) -> str | None:
    """The template of the merged model, as transformers finds it."""
    with CheckpointWriter(out) as writer:
        import torch

        writer.add("x", torch.zeros(1))
        align_vocabularies(wanted, models(wanted)).write_tokenizer(writer)
        writer.commit()
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert template is None or isinstance(template, str)
    return template


def warnings(wanted: Recipe) -> str:
    return "\n".join(map(str, align_vocabularies(wanted, models(wanted)).warnings))


@pytest.mark.parametrize(
    "tokenizer", ["", "tokenizer_source: base\n", "tokenizer: {tokens: {<n>: {source: $one}}}\n"]
)
def test_a_template_replaces_the_models_own(zoo: Path, tokenizer: str) -> None:
    if "<n>" in tokenizer:
        path = zoo / "one" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"]["<n>"] = content["model"]["vocab"].pop("<0>")
        path.write_text(json.dumps(content))
    put(zoo, base="old {{ messages }}")
    settings = json.loads((zoo / "base" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "older {{ messages }}"
    (zoo / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert written(recipe(MERGE + tokenizer, zoo), zoo / "kept") == "old {{ messages }}"
    for number, (wanted, text) in enumerate(
        [("'new {{ messages }}'", "new {{ messages }}"), *((name, TEMPLATES[name]) for name in TEMPLATES)]
    ):
        assert (
            written(recipe(f"{MERGE}{tokenizer}chat_template: {wanted}\n", zoo), zoo / f"out{number}") == text
        )
    assert "old" not in (zoo / "out0" / "tokenizer_config.json").read_text()


def test_auto_is_the_most_common_template(zoo: Path) -> None:
    wanted = recipe(MERGE + "chat_template: auto\n", zoo)
    assert "no model has a chat template, so the merged one gets none" in warnings(wanted)
    assert written(wanted, zoo / "none") is None
    put(zoo, one="a {{ x }}", two="b {{ x }}", three=" b {{ x }}\n")
    assert written(wanted, zoo / "most") == "b {{ x }}"


def test_among_equally_common_templates_the_first_counts(zoo: Path) -> None:
    put(zoo, one="a {{ x }}", two="b {{ x }}")
    wanted = MERGE + "chat_template: auto\n"
    assert written(recipe(wanted, zoo), zoo / "order") == "a {{ x }}"
    put(zoo, base="c {{ x }}")
    assert written(recipe(wanted, zoo), zoo / "base-first") == "c {{ x }}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "chatmll",
            r"r\.yml:4: chat_template: expected a Jinja .* got 'chatmll' \(did you mean 'chatml'\?\)",
        ),
        ("''", r"r\.yml:4: chat_template: expected a Jinja template, or one of auto, alpaca, "),
        ("'{% for m in messages %}'", r"r\.yml:4: chat_template: no Jinja template: line 1 of the template"),
    ],
)
def test_what_is_no_template_is_refused(zoo: Path, text: str, reason: str) -> None:
    wanted = Recipe.from_yaml(f"{MERGE}chat_template: {text}\n".replace("$", f"{zoo}/"), file="r.yml")
    with pytest.raises(ConfigurationError, match=reason):
        align_vocabularies(wanted, models(wanted))


@pytest.mark.parametrize("tokenizer", ["", "tokenizer_source: base\n"])
def test_tokens_that_the_vocabulary_lacks_are_told(zoo: Path, tokenizer: str) -> None:
    found = warnings(recipe(f"{MERGE}{tokenizer}chat_template: chatml\n", zoo))
    assert "the template uses 2 tokens ('<|im_start|>', '<|im_end|>') that the vocabulary lacks" in found
    assert warnings(recipe(f"{MERGE}{tokenizer}chat_template: alpaca\n", zoo)) == ""
