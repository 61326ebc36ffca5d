"""The model card of a merged model: its parents with their licences, its recipe, and how to make it again.

Names and licences come from strangers' files. They are written so that they can be nothing but text: names as
code, licences only if they look like the identifiers the hub uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from evomerge.checkpoints.reader import Checkpoint, contained
from evomerge.checkpoints.reference import ModelReference
from evomerge.errors import ConfigurationError
from evomerge.recipe import Recipe
from evomerge.yaml_file import dump_yaml, parse_yaml

CARD = "README.md"

_MAX_CARD_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENCE = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_LINK = re.compile(r"https://[\w.~/%#-]{1,200}|LICENSE(\.\w{1,4})?", re.ASCII)


@dataclass(frozen=True)
class Licence:
    """What a model's card says of its licence; the parts as the hub names them, empty if not stated."""

    license: str
    license_name: str = ""
    license_link: str = ""

    def __str__(self) -> str:
        return self.license_name or self.license

    @property
    def fields(self) -> dict[str, str]:
        """The front matter that states it."""
        return {key: value for key, value in vars(self).items() if value}


def model_card(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], merges: Sequence[Recipe] = ()) -> str:
    """Write the card.

    Args:
        recipe: The recipe of the model.
        checkpoints: Model as the recipe names it -> its checkpoint.
        merges: Recipes of the merges among its models, and of those among theirs.
    """
    licences = {name: licence_of(checkpoints[name]) for name in recipe.model_names}
    made = {each.name for each in merges if each.name is not None}
    named = [name for each in (*merges, recipe) for name in each.model_names if name not in made]
    front: dict[str, Any] = {}
    ids = [reference.model for name in named if (reference := _hub_reference(name, checkpoints.get(name)))]
    if ids:
        front["base_model"] = list(dict.fromkeys(ids))
    front |= {"library_name": "transformers", **_licence_fields(licences), "tags": ["merge", "evomerge"]}
    parents = "\n".join(
        f"- {_shown(name, checkpoints[name], is_merge=name in made)}; {_licence_words(licences[name])}"
        for name in recipe.model_names
    )
    base = "" if recipe.base_model is None else f"\n\nThe base model is {_code(recipe.base_model)}."
    text = recipes_text(recipe, merges)
    fence = "`" * max(3, _longest_run(text) + 1)
    tool = "mergekit-multi" if merges else "mergekit"
    return f"""---
{dump_yaml(front)}---
# Merged model

Merged with the {_code(recipe.merge_method)} method from:

{parents}{base}

{_licence_paragraph(licences)}

## Recipe

{fence}yaml
{text}{fence}

`evomerge merge mergekit_config.yml OUT_DIR` makes this model again from the parents; {tool} reads the same file.
Made by evomerge {version("evomerge-recipes")} with torch {version("torch")}. `manifest.json` holds the size and
SHA-256 of every file.
"""


def recipes_text(recipe: Recipe, merges: Sequence[Recipe]) -> str:
    """The YAML that makes the model again: its recipe, behind those of the merges it names."""
    return "---\n".join(each.to_yaml() for each in (*merges, recipe))


def licence_of(checkpoint: Checkpoint) -> Licence | None:
    """What the front matter of a model's card says of its licence, or None if it says nothing usable."""
    if not (checkpoint.folder / CARD).exists():
        return None
    try:
        with contained(checkpoint.folder, CARD).open("rb") as stream:
            lines = stream.read(_MAX_CARD_BYTES).decode("utf-8-sig", errors="replace").splitlines()
        if not lines or lines[0].rstrip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
            return None
        end = next(number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---")
        documents = parse_yaml("\n".join(lines[1:end]), lenient=True)
    except (ConfigurationError, OSError):
        return None
    data = documents[0].data if len(documents) == 1 else None
    if not isinstance(data, dict):
        return None
    identifier = _matching(data.get("license"), _LICENCE)
    if not identifier:
        return None
    name, link = _matching(data.get("license_name"), _LICENCE), _matching(data.get("license_link"), _LINK)
    return Licence(identifier, name, link)


def _matching(value: object, pattern: re.Pattern[str]) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _licence_fields(licences: Mapping[str, Licence | None]) -> dict[str, str]:
    """A licence only if all parents state the same; `other` if any states one."""
    found = set(licences.values())
    if len(found) == 1 and (only := found.pop()) is not None:
        return only.fields
    names = sorted({str(licence) for licence in licences.values() if licence is not None})
    return {"license": "other", "license_name": ", ".join(names)} if names else {}


def _licence_paragraph(licences: Mapping[str, Licence | None]) -> str:
    found = set(licences.values())
    if found == {None}:
        return "No parent states its licence; ask before you pass this model on."
    if len(found) == 1:
        return f"All parents state the licence {_code(str(next(iter(found))))}."
    return (
        "The parents do not state one and the same licence; whoever passes this model on must meet all of theirs, "
        "and those of parents that state none."
    )


def _licence_words(licence: Licence | None) -> str:
    return "states no licence" if licence is None else f"licence {_code(str(licence))}"


def _shown(name: str, checkpoint: Checkpoint, *, is_merge: bool) -> str:
    """A parent in Markdown: a link for models of the hub, with the commit that was used."""
    if is_merge:
        return f"{_code(name)}, itself a merge, see below"
    reference = _hub_reference(name, checkpoint)
    if reference is None:
        return _code(name)
    link = f"https://huggingface.co/{reference.model}"
    if reference.revision is not None:
        link += f"/tree/{quote(reference.revision, safe='')}"
    revision = "" if reference.revision is None else f", revision {_code(reference.revision)}"
    commit = checkpoint.folder.name if _COMMIT.fullmatch(checkpoint.folder.name) else ""
    return f"[{reference.model}]({link}){revision}" + (f", commit {_code(commit)}" if commit else "")


def _hub_reference(name: str, checkpoint: Checkpoint | None) -> ModelReference | None:
    """The reference of a model of the hub, or None for a local folder."""
    try:
        reference = ModelReference.parse(name)
    except ValueError:
        return None
    if not _HUB_ID.fullmatch(reference.model) or reference.adapter is not None:
        return None
    is_cached = checkpoint is None or checkpoint.folder.parent.name == "snapshots"
    return reference if is_cached else None


def _code(text: str) -> str:
    """Text as Markdown code, whatever it holds."""
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
