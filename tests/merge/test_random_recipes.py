"""Random recipes: mergekit's tensors from every method, form, filter, gradient, type and tokenizer.

What is compared, element by element:

- At `dtype: float32`, with mergekit's tensors: equal within one unit in the last place of the output type.
- An element that is not has to be within half such a unit, for the rounding to that type, and four float32
  roundings of its summands of the exact result: what mergekit gives at `dtype: float64`. Where summands
  cancel, the last place is finer than their rounding; mergekit's own float32 norms and angles are up to
  twenty such roundings off.
- Elements in the boundary bin of a trimming threshold are left out. So are those of which rounding decides:
  the sign of a sum that is 0 but for rounding, a variance or an importance at its threshold. What another
  choice among these does to the rest of the tensor, by rescaling or by weights, is allowed for.
- Tensors with random masks are compared in distribution; with the density 1 they are like the others.
- At `dtype: bfloat16`, where mergekit rounds more often, with the exact result: no further off than mergekit.

How often an allowance was needed is bounded too; measured shares stand beside the bounds.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import ConfigurationError
from evomerge.merge.bank import Bank
from evomerge.merge.check import check_recipe
from evomerge.merge.execute import merge_tensor
from evomerge.merge.export import export_model
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import TensorPlan, plan_merge
from evomerge.merge.vocabulary import align_vocabularies
from evomerge.recipe import Recipe
from tests.tiny import NAMES, make_model

from .exactness import Exactness, exactness, trims, unit
from .methods.inputs import mergekit
from .random_recipes import RANDOM, TRIMMED, RandomRecipe, make_zoos, random_recipe
from .zoo import assert_same, by_mergekit, merged, models, recipe, tensors, ulps

NUM_BATCHES = 26
ROUNDINGS = 4
ROUNDING = 2.0**-24
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_zoos(tmp_path_factory.mktemp("zoos"))


@pytest.fixture(scope="module")
def banks(zoos: Mapping[str, Path]) -> dict[str, Bank]:
    """One bank per zoo: statistics are computed once for all recipes, as in a search."""
    return {
        zoo: Bank({f"{folder}/{name}": Checkpoint.open(folder / name) for name in NAMES})
        for zoo, folder in zoos.items()
    }


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """mergekit logs every unusual token."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


class Case:
    """A random recipe, merged by both."""

    def __init__(
        self, drawn: RandomRecipe, zoos: Mapping[str, Path], banks: Mapping[str, Bank], folder: Path
    ) -> None:
        self.drawn = drawn
        self.zoo = zoos[drawn.zoo]
        self.folder = folder
        self.recipe = Recipe.from_yaml(self.text())
        check_recipe(self.recipe)
        self.sources = models(self.recipe)
        self.aligned = align_vocabularies(self.recipe, self.sources)
        self.plans = plan_merge(self.recipe, self.aligned.checkpoints).tensors
        shared = None if drawn.zoo == "words" else banks.get(drawn.zoo)
        self.bank = shared or Bank(self.aligned.checkpoints)

    def text(self, **changes: Any) -> str:
        """The recipe's YAML; None removes a key."""
        data = {key: value for key, value in {**self.drawn.data, **changes}.items() if value is not None}
        return yaml.safe_dump(data).replace("$", f"{self.zoo}/")

    @cached_property
    def ours(self) -> dict[str, Tensor]:
        return {plan.name: merge_tensor(plan, self.bank) for plan in self.plans}

    def by_mergekit(self, text: str, name: str) -> dict[str, Tensor]:
        """mergekit's tensors, rows of tokens in our order."""
        torch.manual_seed(0)
        found = by_mergekit(text, self.folder / name)
        ids = self.aligned.tokenizer.ids
        if not ids:
            return found
        theirs = _vocabulary(self.folder / name)
        assert theirs.keys() == ids.keys()
        rows = [theirs[token] for token in sorted(ids, key=lambda token: ids[token])]
        for tensor in VOCABULARY:
            if tensor in found:
                found[tensor] = torch.cat([found[tensor][rows], found[tensor][len(rows) :]])
        return found

    @cached_property
    def theirs(self) -> dict[str, Tensor]:
        return self.by_mergekit(self.text(), "theirs")

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        return self.by_mergekit(self.text(dtype="float64", out_dtype=None), "exact")

    def exactness(self, plan: TensorPlan) -> Exactness:
        return exactness(plan, self.bank, self.exact[plan.name])


def _vocabulary(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "tokenizer.json").read_text())
    return {
        **content["model"]["vocab"],
        **{token["content"]: token["id"] for token in content["added_tokens"]},
    }


def is_random(plan: TensorPlan) -> bool:
    """Whether a tensor depends on random masks."""
    return plan.method.random and any(values.get("density", 1) < 1 for values in plan.values)


@dataclass
class Tally:
    """Counts elements: all, those that differ at all, those beyond one unit, and those that are left out."""

    all: int = 0
    unlike: int = 0
    beyond: int = 0
    left_out: int = 0


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_random_recipes_merge_to_mergekits_tensors(
    batch: int, zoos: Mapping[str, Path], banks: Mapping[str, Bank], tmp_path: Path
) -> None:
    """A batch has one recipe of every method."""
    tallies = {dtype: Tally() for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    for place, method in enumerate(METHODS):
        number = batch * len(METHODS) + place
        case = Case(random_recipe(random.Random(number), method), zoos, banks, tmp_path / str(number))
        assert sorted(case.ours) == sorted(case.theirs)
        masked = []
        for plan in case.plans:
            mine, other = case.ours[plan.name], case.theirs[plan.name]
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), (number, plan.name)
            if is_random(plan):
                masked.append(plan)
            else:
                assert_equal(case, plan, tallies[mine.dtype], number)
        if masked and case.drawn.zoo == "float32" and case.ours[masked[0].name].dtype == torch.float32:
            assert_as_many_kept(case, masked)
        if number % 9 == 0:
            # The YAML we write means the same to mergekit, bit for bit.
            assert_same(case.by_mergekit(case.recipe.to_yaml(), "rewritten"), case.theirs, exact=True)
        if number % 7 == 0:
            export_model(case.recipe, case.sources, tmp_path / f"{number}-ours")
            assert_same(tensors(tmp_path / f"{number}-ours"), case.ours, exact=True)
    for dtype, tally in tallies.items():
        # Of all recipes' elements 5 % are beyond one unit in float32, where many sums cancel, and 0.01 % in
        # shorter types, where 0.1 % differ at all; 0.03 % are left out. A batch can have more.
        short = dtype != torch.float32
        assert tally.unlike <= tally.all * (0.03 if short else 0.4), (dtype, tally)
        assert tally.beyond <= tally.all * (0.01 if short else 0.15), (dtype, tally)
        assert tally.left_out <= tally.all * 0.005, (dtype, tally)


def assert_equal(case: Case, plan: TensorPlan, tally: Tally, number: int) -> None:
    mine, other = case.ours[plan.name], case.theirs[plan.name]
    off = ulps(mine, other) > 1
    tally.all += mine.numel()
    tally.unlike += int((mine != other).sum())
    if not off.any():
        return
    exact, asked = case.exact[plan.name], case.exactness(plan)
    bound = unit(exact, mine.dtype) / 2 + ROUNDINGS * ROUNDING * asked.size + asked.slack
    wrong = off & ~asked.undecided & ~((mine.double() - exact).abs() <= bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"recipe {number}: {plan.name}{list(at)} is {mine[at].item()!r}; mergekit's is {other[at].item()!r}, "
            f"exactly {exact[at].item()!r}; {int(wrong.sum())} of {mine.numel()} differ\n{case.text()}"
        )
    tally.beyond += int((off & ~asked.undecided).sum())
    tally.left_out += int((off & asked.undecided).sum())


# Random masks.


def keep_chances(plan: TensorPlan, bank: Bank) -> Iterator[tuple[int, Tensor]]:
    """Position of every task vector's model with the chance of each of its elements to be kept."""
    assert plan.base is not None
    base = bank.tensor(plan.inputs[plan.base]).float()
    for index, values in enumerate(plan.values):
        if index == plan.base:
            continue
        chance = torch.full(plan.shape, values["density"], dtype=torch.float64)
        if "epsilon" in values and values["density"] < 1:
            delta = (bank.tensor(plan.inputs[index]).float() - base).abs()
            ranks = delta.argsort(dim=-1).argsort(dim=-1).double()
            chance += values["epsilon"] * (2 * ranks / (plan.shape[-1] - 1) - 1)
        yield index, chance.clamp(max=1)


def assert_as_many_kept(case: Case, plans: list[TensorPlan]) -> None:
    """Both change as many elements as the chances say, within five standard deviations."""
    mean, variance, counts = 0.0, 0.0, [0, 0]
    for plan in plans:
        assert plan.base is not None
        base = case.bank.tensor(plan.inputs[plan.base])
        none = torch.ones(plan.shape, dtype=torch.float64)
        for index, chance in keep_chances(plan, case.bank):
            none *= 1 - chance if plan.values[index]["weight"] != 0 else 1.0
        mean += float((1 - none).sum())
        variance += float((none * (1 - none)).sum())
        for place, found in enumerate((case.ours, case.theirs)):
            counts[place] += int((found[plan.name] != base).sum())
    for count in counts:
        assert abs(count - mean) <= 5 * math.sqrt(variance) + 1, (counts, mean, case.text())


# DELLA divides what is kept by its own chance, where mergekit scales by a ratio of norms.
@pytest.mark.parametrize(
    ("method", "rescale"),
    [*((method, False) for method in RANDOM), ("dare_linear", True), ("dare_ties", True)],
)
def test_random_masks_have_mergekits_expectation(
    method: str, rescale: bool, zoos: Mapping[str, Path], banks: Mapping[str, Bank], tmp_path: Path
) -> None:
    """Element by element, and all elements together along the merge without masks, over many seeds."""
    num_seeds, done = 160, 0
    for number in range(1000):
        if done == 6:
            break
        drawn = random_recipe(random.Random(1_000_000 + number), method, zoo="float32")
        case = Case(drawn, zoos, banks, tmp_path)
        masked = [plan for plan in case.plans if is_random(plan)]
        if not masked:
            continue
        done += 1
        plan = max(masked, key=lambda plan: math.prod(plan.shape))
        assert plan.base is not None
        plan = replace(plan, shared={**plan.shared, "rescale": rescale}, dtype="float32")
        inputs = [case.bank.tensor(key).float() for key in plan.inputs]
        base = inputs[plan.base].double()
        ours, theirs = [], []
        for seed in range(num_seeds):
            ours.append(merge_tensor(replace(plan, seed=seed), case.bank).double() - base)
            torch.manual_seed(seed)
            values = [dict(given) for given in plan.values]
            found = mergekit(method, inputs, values, base=plan.base, **plan.shared)
            theirs.append(found.double() - base)
        kept = [{**values, "density": 1.0} if values else {} for values in plan.values]
        whole = merge_tensor(replace(plan, values=tuple(kept)), case.bank).double() - base
        mine, other = torch.stack(ours), torch.stack(theirs)
        assert_same_mean(mine, other, along=whole.sign())
        if method.endswith("linear"):
            # Rescaled, the expectation is the merge without masks.
            plan = replace(plan, shared={**plan.shared, "rescale": True})
            rescaled = [
                merge_tensor(replace(plan, seed=seed), case.bank).double() - base for seed in range(num_seeds)
            ]
            assert_same_mean(torch.stack(rescaled), whole.expand_as(mine), along=whole.sign())
    assert done == 6


def assert_same_mean(a: Tensor, b: Tensor, *, along: Tensor) -> None:
    """The means over the first dimension are the same but for chance; bounds for 1e4 elements at 1e-5."""

    def deviation(a: Tensor, b: Tensor) -> Tensor:
        error = ((a.var(dim=0) + b.var(dim=0)) / len(a)).sqrt()
        return ((a.mean(dim=0) - b.mean(dim=0)).abs() - 1e-7).clamp(min=0) / error.clamp(min=1e-30)

    assert float(deviation(a, b).max()) < 6.5
    assert float(deviation((a * along).flatten(1).sum(1), (b * along).flatten(1).sum(1))) < 4.5


# Trimming.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with an embedding of two million elements, large enough to count in per mille."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"vocab_size": 2**15, "hidden_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": True}
    for dtype in ("float32", "bfloat16"):
        for seed, name in enumerate(NAMES[:2]):
            make_model(folder / dtype / name, seed=seed, dtype=dtype, **sizes)
    return {dtype: folder / dtype for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", TRIMMED)
def test_trimming_keeps_as_many_elements_and_as_much_as_mergekits(
    method: str, dtype: str, seed: int, large: Mapping[str, Path], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    values = {"weight": draw.uniform(0.3, 1.5), "density": draw.uniform(0.2, 0.9)}
    if method != "ties":
        values["gamma"] = draw.choice([0, 0.01, draw.uniform(0, 0.3)])
    data = {
        "models": [{"model": "$one", "parameters": values}],
        "merge_method": method,
        "base_model": "$base",
        "dtype": "float32",
        "parameters": {"normalize": draw.choice([True, False]), "rescale": seed == 2},
    }
    case = Case(RandomRecipe(zoo=dtype, form="models", data=data), large, {}, tmp_path)
    plan = next(plan for plan in case.plans if plan.name == VOCABULARY[0])
    base = case.bank.tensor(plan.inputs[1]).float()
    mine, other = case.ours[plan.name], case.theirs[plan.name]
    counts = [int((found != base).sum()) for found in (mine, other)]
    norms = [float((found.double() - base.double()).abs().sum()) for found in (mine, other)]
    assert counts[0] == pytest.approx(counts[1], rel=0.002)
    assert norms[0] == pytest.approx(norms[1], rel=0.002)
    ((_, trimmed),) = trims(plan, case.bank)
    assert trimmed is not None
    assert int(trimmed.split.sum()) < mine.numel() * (0.01 if dtype == "float32" else 0.3)
    assert_equal(case, plan, Tally(), seed)


# Arithmetic in bfloat16.


@pytest.mark.parametrize("batch", range(6))
def test_in_bfloat16_the_error_is_no_larger_than_mergekits(
    batch: int, zoos: Mapping[str, Path], banks: Mapping[str, Bank], tmp_path: Path
) -> None:
    """The largest error and the sum of errors, of every recipe, but for the rounding of float32 itself."""
    for place, method in enumerate(METHODS):
        number = 2_000_000 + batch * len(METHODS) + place
        drawn = random_recipe(random.Random(number), method)
        drawn = replace(drawn, data={**drawn.data, "dtype": "bfloat16", "out_dtype": "bfloat16"})
        case = Case(drawn, zoos, banks, tmp_path / str(number))
        largest, total = [0.0, 0.0], [0.0, 0.0]
        largest_noise, total_noise = 0.0, 0.0
        for plan in case.plans:
            if is_random(plan):
                continue
            asked = case.exactness(plan)
            decided = ~asked.undecided
            for index, found in enumerate((case.ours, case.theirs)):
                assert found[plan.name].dtype == torch.bfloat16
                error = (found[plan.name].double() - case.exact[plan.name]).abs()[decided]
                largest[index] = max(largest[index], float(error.amax()) if error.numel() else 0.0)
                total[index] += float(error.sum())
            noise = (ROUNDINGS * ROUNDING * asked.size + asked.slack)[decided]
            largest_noise = max(largest_noise, float(noise.amax()) if noise.numel() else 0.0)
            total_noise += float(noise.sum())
        assert largest[0] <= largest[1] + largest_noise, (number, largest, case.text())
        assert total[0] <= total[1] + total_noise, (number, total, case.text())


# What the random recipes leave out.


def test_the_head_is_merged_from_all_models_of_the_last_slice(
    zoos: Mapping[str, Path], tmp_path: Path
) -> None:
    """mergekit takes as many of them as the first slice has."""
    wanted = recipe(
        {
            "slices": [
                {"sources": [{"model": "$one", "layer_range": [0, 1]}]},
                {"sources": [{"model": f"${name}", "layer_range": [1, 3]} for name in ("one", "two")]},
            ],
            "merge_method": "linear",
            "parameters": {"weight": 1},
            "dtype": "float32",
        },
        zoos["float32"],
    )
    ours, theirs = merged(wanted), by_mergekit(wanted, tmp_path)
    one, two = (tensors(zoos["float32"] / name) for name in ("one", "two"))
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(theirs.pop(name), one[name])
        assert torch.allclose(ours.pop(name), (one[name] + two[name]) / 2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keep_at_least_one_element(method: str, zoos: Mapping[str, Path], tmp_path: Path) -> None:
    """mergekit keeps none where the density asks for less than one."""
    wanted = recipe(
        {
            "models": [{"model": "$one", "parameters": {"weight": 1, "density": 0.04, "gamma": 0}}],
            "merge_method": method,
            "base_model": "$base",
            "dtype": "float32",
        },
        zoos["float32"],
    )
    base = tensors(zoos["float32"] / "base")["model.norm.weight"]
    counts = [
        int((found["model.norm.weight"] != base).sum())
        for found in (merged(wanted), by_mergekit(wanted, tmp_path))
    ]
    assert counts == [1, 0]


def test_a_gradient_of_counts_must_give_counts(zoos: Mapping[str, Path]) -> None:
    text = {
        "models": [{"model": "$one"}, {"model": "$two"}],
        "merge_method": "karcher",
        "dtype": "float32",
        "parameters": {"max_iter": [3, 10]},
    }
    with pytest.raises(ConfigurationError, match=r"max_iter: expected a whole number, got 6\.5"):
        merged(recipe(text, zoos["float32"]))
