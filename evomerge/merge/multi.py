"""Files of several recipes, where a merge may be a model of the next one, as mergekit-multi takes them.

    documents ─► named and unnamed ─► order: a merge comes before those that name it ─► final merge last

A document with `name: x` may be named as a model by the others; a name wins over a folder or a model of the
hub. The final merge is the document without a name, or else the only one that no other uses. Its checkpoint
carries the recipes of all merges it is made from, so it can be made again from its folder alone.

Format: https://github.com/arcee-ai/mergekit/blob/main/docs/multimerge.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from evomerge.checkpoints.durable import write_atomic
from evomerge.checkpoints.hashes import cached_sha256
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference
from evomerge.checkpoints.staging import StagingFolder
from evomerge.checkpoints.tokenizer import processor_files, tokenizer_files
from evomerge.checkpoints.writer import refuse_if_occupied, verify_manifest
from evomerge.errors import CheckpointError, ConfigurationError, Fault, RefusedError
from evomerge.merge.card import recipes_text
from evomerge.merge.check import check_recipe
from evomerge.merge.export import GENERATION_CONFIG
from evomerge.merge.load import open_models
from evomerge.recipe import Recipe

Export = Callable[[Recipe, Mapping[str, Checkpoint], Path, Sequence[Recipe]], None]
"""Merges (recipe, its models, folder to make, recipes of the merges among its models)."""


@dataclass(frozen=True, kw_only=True)
class MergeFile:
    """A file of one or more recipes.

    Attributes:
        path: The file.
        named: Name -> its recipe, in an order in which each comes after those it uses.
        final: The recipe of the model asked for; it may be one of `named`.
        warnings: What is unusual but not wrong.
    """

    path: Path
    named: Mapping[str, Recipe]
    final: Recipe
    warnings: tuple[Fault, ...]

    def behind(self, recipe: Recipe) -> list[Recipe]:
        """The recipes of all merges a recipe is made from, in order."""
        wanted = set(recipe.model_names)
        found: list[Recipe] = []
        for name in reversed(list(self.named)):
            if name in wanted and self.named[name] is not recipe:
                wanted |= set(self.named[name].model_names)
                found.insert(0, self.named[name])
        return found

    @property
    def unused(self) -> list[str]:
        """Names of merges that the final one is not made from."""
        used = [id(recipe) for recipe in (*self.behind(self.final), self.final)]
        return [name for name, recipe in self.named.items() if id(recipe) not in used]


def read_merges(path: Path) -> MergeFile:
    """Read and check the recipes of a file, and make sure that their models can be opened.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    recipes = Recipe.read_all(path)
    named = _named(recipes)
    ordered = _ordered(named)
    final = _final(recipes, named)
    warnings: list[Fault] = []
    faults: list[Fault] = []
    for recipe in recipes:
        try:
            warnings += check_recipe(recipe)
            open_models(recipe, path.resolve().parent, dict.fromkeys(named))
        except ConfigurationError as error:
            faults += error.faults
    if faults:
        raise ConfigurationError(faults)
    return MergeFile(path=path, named=ordered, final=final, warnings=tuple(warnings))


def merge_all(
    file: MergeFile,
    out_dir: Path,
    export: Export,
    *,
    intermediate_dir: Path | None = None,
    news: Callable[[str], None] = lambda _: None,
) -> None:
    """Merge a file's recipes, the final one into `out_dir`.

    Args:
        file: What `read_merges` returned.
        out_dir: Folder to create for the final merge.
        export: Makes one merge.
        intermediate_dir: Folder for the other merges, which are kept and used again if nothing they are made
            from changed; without it they are removed at the end.
        news: Called with what happens.

    Raises:
        RefusedError: `out_dir` is not empty, or a folder for a merge holds something else.
        EvomergeError: A merge fails.
    """
    refuse_if_occupied(out_dir)
    wanted = file.behind(file.final)
    if intermediate_dir is not None:
        wanted = [recipe for recipe in file.named.values() if recipe is not file.final]
        intermediate_dir.mkdir(parents=True, exist_ok=True)
        _merge_each(file, wanted, intermediate_dir, out_dir, export, news, keep=True)
    elif file.unused:
        raise ConfigurationError(
            f"{file.path}: no other document uses {', '.join(file.unused)}; give --intermediate-dir to keep it"
        )
    elif wanted:
        out_dir.resolve().parent.mkdir(parents=True, exist_ok=True)
        scratch = StagingFolder(out_dir.resolve(), "merges")
        try:
            _merge_each(file, wanted, scratch.path, out_dir, export, news, keep=False)
        finally:
            scratch.remove()
    else:
        _merge_each(file, [], out_dir, out_dir, export, news, keep=False)


def _merge_each(
    file: MergeFile,
    recipes: Sequence[Recipe],
    folder: Path,
    out_dir: Path,
    export: Export,
    news: Callable[[str], None],
    *,
    keep: bool,
) -> None:
    made: dict[str, Path] = {}
    beside = file.path.resolve().parent
    for recipe in recipes:
        assert recipe.name is not None, "only the final merge may lack a name"
        target = made[recipe.name] = folder / recipe.name
        merges, models = file.behind(recipe), open_models(recipe, beside, made)
        record = _origin(recipes_text(recipe, merges), models) if keep else None
        if record is not None and _is_made_from(target, record):
            news(f"{target} is used as it is: nothing it is made from changed")
            continue
        refuse_if_occupied(target)
        if record is not None:
            write_atomic(_record_file(target), record)
        news(f"merging {recipe.name}")
        export(recipe, models, target, merges)
    export(file.final, open_models(file.final, beside, made), out_dir, file.behind(file.final))


def _origin(text: str, models: Mapping[str, Checkpoint]) -> str:
    """Everything a merge depends on, as text: version, recipes, and hashes of the models' files."""
    hashes = {}
    for name, checkpoint in models.items():
        hashes[name] = {"weights": checkpoint.content_hash()}
        files = (*tokenizer_files(checkpoint.folder), *processor_files(checkpoint.folder))
        others = [*files, checkpoint.folder / GENERATION_CONFIG]
        hashes[name] |= {file.name: cached_sha256(file) for file in others if file.exists()}
    content = {"evomerge": version("evomerge-recipes"), "recipes": text, "models": hashes}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _record_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.inputs.json")


def _is_made_from(target: Path, record: str) -> bool:
    """Whether a merge that was kept is complete and made from the same; a different one is refused."""
    if not target.exists() or not any(target.iterdir()):
        return False
    remedy = "remove it to merge it again, or choose another --intermediate-dir"
    try:
        verify_manifest(target)
    except CheckpointError as error:
        raise RefusedError(f"{target}: cannot be used again: {error}; {remedy}") from None
    file = _record_file(target)
    if not file.exists() or file.read_text(encoding="utf-8") != record:
        raise RefusedError(
            f"{target}: made from another recipe, other models or by another version; {remedy}"
        )
    return True


def _named(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Name -> recipe, in the file's order."""
    named: dict[str, Recipe] = {}
    faults: list[Fault] = []
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    for recipe in unnamed[1:]:
        faults.append(recipe.fault((), "a second recipe without a name; only the final one may lack it"))
    for recipe in recipes if len(recipes) > 1 else ():
        if recipe.name is None:
            continue
        reason = _name_fault(recipe.name)
        if reason:
            faults.append(recipe.fault(("name",), reason))
        elif recipe.name in named:
            faults.append(recipe.fault(("name",), f"another recipe has the name {recipe.name!r}; rename one"))
        else:
            named[recipe.name] = recipe
    for recipe in recipes:
        for place, text in recipe.model_places():
            model = text.split("@", 1)[0].split("+", 1)[0]
            if model in named and text != model:
                reason = f"{model} is a merge of this file and takes no revision and no adapter, got {text!r}"
                faults.append(recipe.fault(place, reason))
    if faults:
        raise ConfigurationError(faults)
    return named


def _name_fault(name: str) -> str:
    """What is wrong with a name, which becomes that of a folder and stands for a model."""
    try:
        ModelReference(name)
    except ValueError as error:
        return f"a name stands for a model: {error}"
    if "/" in name or "\\" in name or name.startswith(".") or name.endswith(".inputs.json"):
        return f"expected a name without '/' that does not start with '.', got {name!r}"
    return ""


def _ordered(named: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes, each behind those it uses."""
    ordered: dict[str, Recipe] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            recipe = named[path[-1]]
            place = next(place for place, text in recipe.model_places() if text == name)
            raise ConfigurationError(recipe.fault(place, f"the merges need each other: {circle}"))
        if name not in ordered:
            for model in named[name].model_names:
                if model in named:
                    visit(model, (*path, name))
            ordered[name] = named[name]

    for name in named:
        visit(name, ())
    return ordered


def _final(recipes: Sequence[Recipe], named: Mapping[str, Recipe]) -> Recipe:
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    if unnamed or len(recipes) == 1:
        return (unnamed or recipes)[0]
    used = {model for recipe in recipes for model in recipe.model_names}
    ends = [name for name in named if name not in used]
    if len(ends) != 1:
        reason = (
            f"no other recipe uses {', '.join(ends)}: it is not clear which is the final one; "
            "leave out the name of that one"
        )
        raise ConfigurationError(named[ends[-1]].fault(("name",), reason))
    return named[ends[0]]
