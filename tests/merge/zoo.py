"""Recipes over the tiny zoo: merged in memory, by export, and by mergekit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.check import check_recipe
from evomerge.merge.execute import merge_tensor
from evomerge.merge.load import open_models
from evomerge.merge.plan import MergePlan, TensorPlan, plan_merge
from evomerge.recipe import Recipe

from .methods.trimming import at_ends


def recipe(text: str | Mapping[str, Any], zoo: Path) -> Recipe:
    """A recipe that names the zoo's models by `$`, such as `$one`."""
    if not isinstance(text, str):
        text = yaml.safe_dump(text)
    return Recipe.from_yaml(text.replace("$", f"{zoo}/"))


def models(wanted: Recipe) -> dict[str, Checkpoint]:
    return open_models(wanted, Path("/"))


def plan(text: str | Mapping[str, Any], zoo: Path) -> MergePlan:
    wanted = recipe(text, zoo)
    check_recipe(wanted)
    return plan_merge(wanted, models(wanted))


def tensor_plan(text: str | Mapping[str, Any], zoo: Path, name: str) -> TensorPlan:
    return next(tensor for tensor in plan(text, zoo).tensors if tensor.name == name)


def merged(wanted: Recipe) -> dict[str, Tensor]:
    """The merged tensors, in memory."""
    check_recipe(wanted)
    sources = models(wanted)
    return {tensor.name: merge_tensor(tensor, sources) for tensor in plan_merge(wanted, sources).tensors}


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}


def by_mergekit(wanted: Recipe | str, out: Path) -> dict[str, Tensor]:
    """What mergekit makes of the YAML."""
    from tests.oracle import LoaderCache, MergeConfiguration, MergeOptions, run_merge

    text = wanted if isinstance(wanted, str) else wanted.to_yaml()
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LoaderCache().flush_all()
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, clone_tensors=True)
        run_merge(configuration, str(out), options)
    found: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """What a recipe with trimmed task vectors leaves open, per output tensor.

    Of the elements in the bin at a threshold we keep others than mergekit, though as many.

    Attributes:
        open: Mask of the elements that are in such a bin for some source.
        slack: Most that the others may differ by, as rescaling goes by the norm of what is kept.
    """

    open: dict[str, Tensor]
    slack: dict[str, float]


def trimmed(wanted: Recipe) -> Trimmed:
    """What a recipe by TIES leaves open."""
    sources = models(wanted)
    is_open: dict[str, Tensor] = {}
    slack: dict[str, float] = {}
    for tensor in plan_merge(wanted, sources).tensors:
        is_open[tensor.name] = torch.zeros(tensor.shape, dtype=torch.bool)
        slack[tensor.name] = 0.0
        if tensor.method.name != "ties" or tensor.base is None:
            continue
        loaded = [sources[model].tensor(name).float() for model, name in tensor.inputs]
        for index, (values, source) in enumerate(zip(tensor.values, loaded, strict=True)):
            if index == tensor.base or values["density"] >= 1:
                continue
            delta = source - loaded[tensor.base]
            count = delta.numel()
            kept = max(1, int(values["density"] * count))
            here = at_ends(delta, count - kept, count)
            is_open[tensor.name] |= here
            if tensor.shared["rescale"]:
                magnitudes = delta.abs().flatten().sort(descending=True).values
                norm = float(magnitudes[:kept].sum())
                unsure = float(magnitudes.max() * here.sum()) / 512 / max(norm, 1e-30)
                rescaled = float(magnitudes.max() * magnitudes.sum()) / max(norm, 1e-30)
                strength = abs(values["weight"] * tensor.shared["lambda"])
                slack[tensor.name] += unsure * rescaled * max(strength, abs(tensor.shared["lambda"]))
    return Trimmed(open=is_open, slack=slack)


def assert_same(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    exact: bool = False,
    trimmed: Trimmed | None = None,
) -> None:
    """Same names, shapes and types; values equal, or within one unit in the last place.

    The two add float32 numbers in another order. Where the summands, at most about 1, cancel, the sum's last
    place is finer than their rounding: differences up to 4e-7 count as equal there. With `trimmed`, what it
    leaves open is not compared.
    """
    assert sorted(ours) == sorted(theirs)
    for name, mine in ours.items():
        other = theirs[name]
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
        if exact and trimmed is None:
            assert torch.equal(mine, other), name
            continue
        apart = (mine.double() - other.double()).abs()
        same = mine == other
        if not exact:
            same |= apart <= 4e-7 + (trimmed.slack[name] if trimmed else 0.0)
            same |= ulps(mine, other) <= 1
        if trimmed is not None:
            assert float(trimmed.open[name].double().mean()) < 0.1, name
            same |= trimmed.open[name]
        assert bool(same.all()), f"{name}: {float(apart[~same].max())} apart"


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their type lie between two tensors, element by element."""
    return (_ordered(a) - _ordered(b)).abs()


def _ordered(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
    bits = tensor.contiguous().view(integer).long()
    lowest = -(1 << (8 * tensor.itemsize - 1))
    return torch.where(bits < 0, lowest - bits, bits)
