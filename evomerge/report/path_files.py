"""Paths that files describe: a passthrough recipe, or a checkpoint that carries its path.

A recipe is read as it stands, without its models, so that it can be looked at anywhere. It says nothing of
layers that no slice takes, so a model is as deep here as the last of its layers in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.decoder import is_mlp_output
from evomerge.checkpoints.folder import what
from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER
from evomerge.checkpoints.reader import CONFIG
from evomerge.errors import CheckpointError, ConfigurationError
from evomerge.merge.export import RECIPE
from evomerge.merge.plan import TORCH_DTYPES
from evomerge.recipe import Module, OutputSlice, Parameters, Recipe, evaluate
from evomerge.report.path_map import SCALE_MEANS, PathMap
from evomerge.run_dir import RunDir
from evomerge.spaces.path import Hop
from evomerge.spaces.sakana import read_sakana
from evomerge.yaml_file import read_yaml

_RECIPE_SCALE_MEANS = "factor on the MLP output of the hop"
_LAYER = re.compile(r"(?:^|\.)(?!experts?\.)[a-z_]+\.(\d+)\.")


def is_run(place: Path) -> bool:
    """Whether a folder holds a run."""
    return RunDir(place).journal.exists()


def path_of_file(place: Path) -> PathMap:
    """The path that a recipe or a checkpoint describes.

    Args:
        place: A passthrough recipe; or the folder of a checkpoint that was merged by one, or that is in the
            format of `spaces/sakana.py`.

    Raises:
        ConfigurationError: It is neither, or has no path.
    """
    if place.is_file():
        return path_of_recipe(place)
    if (place / RECIPE).is_file():
        return path_of_recipe(place / RECIPE)
    if not (place / CONFIG).is_file():
        raise ConfigurationError(
            f"{place}: expected a run directory, a passthrough recipe or a checkpoint, found {what(place)} without "
            f"journal.jsonl and {CONFIG}"
        )
    try:
        model = read_sakana(place)
    except CheckpointError as error:
        raise CheckpointError(
            f"{place}: expected a checkpoint that was merged by a passthrough recipe, with {RECIPE}, or one in the "
            f"format of EvoLLM-JP-v1-10B: {error}"
        ) from error
    return PathMap(
        title=str(place),
        hops=model.hops,
        depths={model.name: num_layers(model.checkpoint.tensors)},
        scale_means=SCALE_MEANS["branch"],
    )


def checkpoint_recipe(folder: Path) -> Recipe:
    """The passthrough recipe of a checkpoint in the format of `spaces/sakana.py`.

    Raises:
        ConfigurationError: It is in another format, or a scale cannot be folded into weights.
    """
    model = read_sakana(folder.resolve())
    found = {info.dtype for info in model.checkpoint.tensors.values()}
    return model.recipe(TORCH_DTYPES.get(found.pop(), "float32") if len(found) == 1 else "float32")


def path_of_recipe(file: Path) -> PathMap:
    """The path that a passthrough recipe describes; the scale of a hop is that of its MLP's output.

    Args:
        file: The recipe; of several recipes in one file the one without a name counts.

    Raises:
        ConfigurationError: The file is no recipe, or its recipe has no path.
    """
    recipe = _final(file)
    hops = tuple(_hops(file, recipe))
    depths: dict[str, int] = {}
    for hop in hops:
        depths[hop.model] = max(depths.get(hop.model, 0), hop.layer + 1)
    return PathMap(title=str(file), hops=hops, depths=depths, scale_means=_RECIPE_SCALE_MEANS)


def _final(file: Path) -> Recipe:
    for document in read_yaml(file, lenient=True):
        if not isinstance(document.data, dict) or "merge_method" not in document.data:
            raise ConfigurationError(document.fault((), "expected a recipe, which has a merge_method"))
    recipes = Recipe.read_all(file)
    final = [recipe for recipe in recipes if recipe.name is None] if len(recipes) > 1 else recipes
    if len(final) != 1:
        raise ConfigurationError(
            f"{file}: expected one recipe, or several of which one has no name, found {len(final)} without; "
            "put the one to look at in a file of its own"
        )
    return final[0]


def _hops(file: Path, recipe: Recipe) -> Iterator[Hop]:
    holders = {place[-1] if place else DEFAULT: holder for place, holder in recipe.modules_or_self()}
    holder = holders.get(TEXT_DECODER) or holders.get(DEFAULT) or next(iter(holders.values()))
    if recipe.merge_method != "passthrough" or not holder.slices:
        found = recipe.merge_method + ("" if holder.slices else " of whole models")
        raise ConfigurationError(
            f"{file}: this recipe has no path: expected merge_method passthrough with slices, got {found}"
        )
    rescaled = {scale.tensor: scale.factor for scale in recipe.evomerge.scales if is_mlp_output(scale.tensor)}
    module = holder.parameters if isinstance(holder, Module) else None
    position = 0
    for piece in holder.slices:
        if len(piece.sources) != 1:
            raise ConfigurationError(
                f"{file}: this recipe has no path: expected one source per slice, got {len(piece.sources)}"
            )
        levels = [piece.sources[0].parameters, piece.parameters, module, recipe.parameters]
        for offset, layer in enumerate(range(*piece.sources[0].layer_range)):
            scale = _mlp_scale(levels, layer, _depth(piece, offset)) * _rescale(rescaled, position)
            yield Hop(model=piece.sources[0].model, layer=layer, scale=scale)
            position += 1


def _mlp_scale(levels: Sequence[Parameters | None], layer: int, depth: float) -> float:
    """The scale of what a layer's MLP writes, by mergekit's precedence of parameters."""
    for level in levels:
        for conditional in (level or {}).get("scale", []):
            text = conditional.filter
            if text in (None, "*") or (is_mlp_output(text or "") and _layer_of(text or "") in (None, layer)):
                setting = [conditional.model_copy(update={"filter": None})]
                value = evaluate(setting, tensor_name="", depth=depth, kind="float")
                if value is not None:
                    return float(value)
    return 1.0


def _rescale(rescaled: Mapping[str, float], position: int) -> float:
    """The factor of an output layer's MLP under `evomerge: scales`."""
    found = [factor for tensor, factor in rescaled.items() if _layer_of(tensor) == position]
    return found[0] if found else 1.0


def _layer_of(name: str) -> int | None:
    """The layer in a tensor's name, or None if the text names none."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _depth(piece: OutputSlice, offset: int) -> float:
    return offset / (piece.num_layers - 1) if piece.num_layers > 1 else 1.0
