"""The card names parents, licences and recipe, whatever strangers put into names and files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.card import Licence, licence_of, model_card
from evomerge.recipe import Recipe


def card(
    recipe: Recipe, folders: dict[str, Path], merges: tuple[Recipe, ...] = ()
) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    text = model_card(recipe, {name: Checkpoint.open(folder) for name, folder in folders.items()}, merges)
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


def parent(zoo: Path, folder: Path, readme: str | None = None) -> Path:
    shutil.copytree(zoo / "one", folder)
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def snapshot(zoo: Path, cache: Path, readme: str | None = None) -> Path:
    return parent(zoo, cache / "snapshots" / ("0123456789" * 4), readme)


def average(*names: str) -> Recipe:
    models = [{"model": name, "parameters": {"weight": 1}} for name in names]
    return Recipe.from_dict({"models": models, "merge_method": "linear"})


APACHE = "---\nlicense: apache-2.0\n---\n# Model\n"


def test_parents_of_the_hub_are_linked_with_revision_and_commit(tiny_zoo: Path, tmp_path: Path) -> None:
    folders = {
        "org/a": snapshot(tiny_zoo, tmp_path / "a", APACHE),
        "org/b@refs/pr/1": snapshot(tiny_zoo, tmp_path / "b", APACHE),
        "/local/c": parent(tiny_zoo, tmp_path / "c", APACHE),
    }
    front, body = card(average(*folders), folders)
    assert front["base_model"] == ["org/a", "org/b"]
    assert front["license"] == "apache-2.0"
    assert (front["library_name"], front["tags"]) == ("transformers", ["merge", "evomerge"])
    commit = "0123456789" * 4
    assert f"- [org/a](https://huggingface.co/org/a), commit `{commit}`; licence `apache-2.0`" in body
    assert "[org/b](https://huggingface.co/org/b/tree/refs%2Fpr%2F1), revision `refs/pr/1`" in body
    assert "- `/local/c`; licence `apache-2.0`" in body
    assert str(tmp_path) not in body


def test_a_local_folder_that_looks_like_a_hub_id_is_not_linked(tiny_zoo: Path, tmp_path: Path) -> None:
    front, body = card(average("models/one"), {"models/one": tiny_zoo / "one"})
    assert "base_model" not in front
    assert "huggingface.co" not in body


def test_the_recipe_and_the_versions_are_there(tiny_zoo: Path) -> None:
    name = str(tiny_zoo / "one")
    recipe = Recipe.from_dict({**average(name).to_dict(), "base_model": name})
    _, body = card(recipe, {name: tiny_zoo / "one"})
    assert f"```yaml\n{recipe.to_yaml()}```\n" in body
    assert f"The base model is `{name}`." in body
    assert "`evomerge merge mergekit_config.yml OUT_DIR`" in body
    assert re.search(r"evomerge \d+\.\d+\.\d+ with torch \d", body)


@pytest.mark.parametrize(
    ("cards", "expected", "words"),
    [
        ([APACHE, APACHE], {"license": "apache-2.0"}, "All parents state the licence `apache-2.0`."),
        (
            [APACHE, "---\nlicense: llama3.1\n---\n"],
            {"license": "other", "license_name": "apache-2.0, llama3.1"},
            "must meet all of theirs",
        ),
        ([APACHE, None], {"license": "other", "license_name": "apache-2.0"}, "parents that state none"),
        ([None, "# no front matter"], {}, "No parent states its licence"),
        (
            ["---\nlicense: other\nlicense_name: gemma\nlicense_link: LICENSE\n---\n"] * 2,
            {"license": "other", "license_name": "gemma", "license_link": "LICENSE"},
            "`gemma`",
        ),
        (
            [f"---\nlicense: other\nlicense_name: {name}\n---\n" for name in ("gemma", "qwen")],
            {"license": "other", "license_name": "gemma, qwen"},
            "must meet all",
        ),
    ],
)
def test_a_licence_is_stated_only_if_all_parents_agree(
    cards: list[str | None], expected: dict[str, str], words: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    folders = {f"/m{n}": parent(tiny_zoo, tmp_path / str(n), text) for n, text in enumerate(cards)}
    front, body = card(average(*folders), folders)
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected
    assert words in body


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "---\n",
        "---\nlicense: apache-2.0\n",
        "---\nlicense: [mit, gpl]\n---\n",
        "---\nlicense: !!python/object/apply:os.system [true]\n---\n",
        "---\nlicense: 'x](javascript:alert(1))'\n---\n",
        "---\nlicense: |\n  mit\n  # Injected\n---\n",
        "---\nlicense: &a [*a]\n---\n",
        "---\nlicense: mit\nlicense: mit\n---\n",
        "---\n- license\n---\n",
        "---\n{{{\n---\n",
        "---\n\x00\n---\n",
    ],
)
def test_a_card_that_cannot_be_trusted_states_no_licence(readme: str, tiny_zoo: Path, tmp_path: Path) -> None:
    assert licence_of(Checkpoint.open(parent(tiny_zoo, tmp_path / "m", readme))) is None


def test_a_card_that_is_no_text_or_leads_elsewhere_states_no_licence(tiny_zoo: Path, tmp_path: Path) -> None:
    folder = parent(tiny_zoo, tmp_path / "m")
    (tmp_path / "secret.md").write_text(APACHE)
    (folder / "README.md").symlink_to(tmp_path / "secret.md")
    assert licence_of(Checkpoint.open(folder)) is None
    (folder / "README.md").unlink()
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    assert licence_of(Checkpoint.open(folder)) == Licence("mit")


def test_links_of_licences_are_only_plain_ones(tiny_zoo: Path, tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: x\nlicense_link: 'javascript:alert(1)'\n---\n"
    assert licence_of(Checkpoint.open(parent(tiny_zoo, tmp_path / "m", text))) == Licence("other", "x", "")


def test_names_and_templates_of_strangers_stay_text(tiny_zoo: Path) -> None:
    name = "/m`](javascript:x) <script>| # ``"
    settings = {**average(name).to_dict(), "chat_template": "{{ x }}\n```\n# Injected\n````"}
    front, body = card(Recipe.from_dict(settings), {name: tiny_zoo / "one"})
    assert "base_model" not in front
    assert f"- ``` {name} ```; states no licence" in body
    assert "\n`````yaml\n" in body
    assert body.count("\n`````") == 1 + len(re.findall(r"`````\n\n`evomerge merge", body))


def test_a_merge_among_the_parents_is_no_model_of_the_hub(tiny_zoo: Path, tmp_path: Path) -> None:
    inner = Recipe.from_dict({**average("org/a").to_dict(), "name": "left"})
    folder = snapshot(tiny_zoo, tmp_path / "a", APACHE)
    front, body = card(average("left", "org/a"), {"left": tiny_zoo / "two", "org/a": folder}, (inner,))
    assert front["base_model"] == ["org/a"]
    assert "- `left`, itself a merge, see below" in body
    assert "name: left" in body
    assert "mergekit-multi reads the same file" in body
