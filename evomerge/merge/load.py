"""From a recipe file to a checked recipe with its models opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, resolve
from evomerge.checkpoints.sakana import is_sakana, open_layers
from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.merge.check import check_recipe
from evomerge.merge.plan import MergePlan, plan_merge
from evomerge.merge.vocabulary import align_vocabularies
from evomerge.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe that can be merged.

    Attributes:
        recipe: The recipe.
        checkpoints: Model as the recipe names it -> its checkpoint.
        plan: What to do for every tensor.
        warnings: What is unusual but not wrong.
    """

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    plan: MergePlan
    warnings: tuple[Fault, ...]


def load_recipe(path: Path) -> LoadedRecipe:
    """Read a recipe, check it, open its models and plan it; only headers of weight files are read.

    Local models are looked for beside the recipe first, then in the working directory.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    recipe = Recipe.read(path)
    warnings = check_recipe(recipe)
    checkpoints = open_models(recipe, path.resolve().parent)
    aligned = align_vocabularies(recipe, checkpoints)
    plan = plan_merge(recipe, aligned.checkpoints)
    return LoadedRecipe(
        recipe=recipe,
        checkpoints=checkpoints,
        plan=plan,
        warnings=(*warnings, *aligned.warnings, *plan.warnings),
    )


def open_models(
    recipe: Recipe, folder: Path, merges: Mapping[str, Path | None] = MappingProxyType({})
) -> dict[str, Checkpoint]:
    """Open every model a recipe names.

    Args:
        recipe: The recipe.
        folder: Where relative paths are looked for first.
        merges: Name of a merge that counts as a model -> its checkpoint's folder, or None to pass it over.

    Raises:
        ConfigurationError: Carries one fault per model that cannot be opened.
    """
    checkpoints: dict[str, Checkpoint] = {}
    faults: list[Fault] = []
    places = {source.model: (*place, "model") for place, source in recipe.inputs()}
    for name in recipe.model_names:
        place = places.get(name, ("base_model",))
        merged = merges.get(name)
        if name in merges and merged is None:
            continue
        try:
            place_on_disk = merged or resolve(ModelReference.parse(name), roots=[folder])
            open_it = open_layers if is_sakana(place_on_disk) else Checkpoint.open
            checkpoints[name] = open_it(place_on_disk)
        except ConfigurationError as error:
            for fault in error.faults:
                text = f"{fault.path}: {fault.reason}" if fault.path else fault.reason
                where = f"{fault.file}: " if fault.file else ""
                faults.append(recipe.fault(place, where + text + nearest(name, merges)))
        except ValueError as error:
            faults.append(recipe.fault(place, str(error)))
    if faults:
        raise ConfigurationError(faults)
    return checkpoints
