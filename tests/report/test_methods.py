"""The page of the merge methods says what the methods declare."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from evomerge.cli.listing import methods
from evomerge.merge.methods import METHODS
from evomerge.report.methods import inputs_in_words, methods_page

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_up_to_date() -> None:
    message = "docs/methods.md is stale: run evomerge methods --markdown > docs/methods.md"
    assert PAGE.read_text(encoding="utf-8") == methods_page(METHODS.values()), message


def test_the_command_line_prints_the_page_and_what_a_method_takes() -> None:
    assert CliRunner().invoke(methods, ["--markdown"]).output == methods_page(METHODS.values())
    assert "Takes exactly 2 models, and a base model if there is one." in CliRunner().invoke(methods).output
    assert '"base_model": "optional"' in CliRunner().invoke(methods, ["--json"]).output


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_what_it_does_and_when_to_use_it(name: str) -> None:
    method = METHODS[name]
    for text in (method.concept, method.when, method.differences or "None."):
        assert text == text.strip()
        assert text.endswith(".")
    (section,) = [part for part in methods_page([method]).split("\n## ") if part.startswith(f"{name}\n")]
    words = " ".join(section.split())
    for text in (
        method.title,
        method.summary,
        method.concept,
        method.when,
        method.differences,
        method.reference,
    ):
        assert text in words
    for parameter in method.parameters:
        assert f"| `{parameter.name}` | {parameter.kind} | {parameter.scope} |" in section


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear", "1 or more models, a base model counting as one of them"),
        ("slerp", "a base model and exactly 1 other model"),
        ("nuslerp", "exactly 2 models, and a base model if there is one"),
        ("multislerp", "1 or more models, and a base model if there is one"),
        ("ties", "a base model and any number of other models"),
        ("model_stock", "a base model and 2 or more other models"),
        ("passthrough", "exactly 1 model, a base model counting as one of them"),
    ],
)
def test_inputs_are_put_in_words(name: str, words: str) -> None:
    assert inputs_in_words(METHODS[name]) == words
