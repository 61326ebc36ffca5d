"""Whole merges: the same recipe gives mergekit's tensors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.merge.execute import merge_tensor
from evomerge.merge.export import export_model
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe
from evomerge.spaces import SourceModels, build_space
from evomerge.yaml_file import Document

from .zoo import assert_same, by_mergekit, merged, models, recipe, tensors, trimmed

FIXED = {
    "linear": """
        models:
        - {model: $one, parameters: {weight: 1}}
        - {model: $two, parameters: {weight: 0.5}}
        - {model: $three, parameters: {weight: -0.1}}
        merge_method: linear
        """,
    "linear with base, not normalised": """
        models:
        - {model: $one, parameters: {weight: 0.3}}
        - {model: $two, parameters: {weight: 1e-1}}
        merge_method: linear
        base_model: $base
        parameters: {normalize: no, weight: 0.6}
        """,
    "slerp with filters and gradients": """
        slices:
        - sources:
          - {model: $base, layer_range: [0, 4]}
          - {model: $one, layer_range: [0, 4]}
        merge_method: slerp
        base_model: $base
        parameters:
          t:
          - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
          - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
          - value: 0.5
        """,
    "slerp without the base among the models": """
        models: [{model: $one}]
        merge_method: slerp
        base_model: $base
        parameters: {t: 0.3}
        """,
    "task_arithmetic at every level": """
        slices:
        - sources:
          - {model: $one, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 2}]}}
          - {model: $base, layer_range: [0, 2]}
          - {model: $two, layer_range: [1, 3], parameters: {weight: [{filter: layers.1., value: [0.1, 3]}]}}
          parameters:
            weight: [{filter: mlp, value: [0, 1]}]
            lambda: 0.5
        - sources:
          - {model: $base, layer_range: [2, 4]}
          - {model: $three, layer_range: [2, 4]}
          parameters:
            lambda: [{filter: norm, value: 0}]
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 0.7, lambda: 1.5, normalize: [{filter: v_proj, value: true}, {value: false}]}
        """,
    "task_arithmetic in modules": """
        modules:
          default:
            models:
            - {model: $one, parameters: {weight: 0.3}}
            - {model: $two}
            parameters: {weight: [0.1, 0.9], normalize: true}
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 5}
        """,
    "ties": """
        models:
        - {model: $one, parameters: {weight: 0.5, density: [1, 0.3]}}
        - {model: $two, parameters: {weight: 0.8, density: 0.4}}
        - {model: $three, parameters: {weight: -0.2}}
        - {model: $base}
        merge_method: ties
        base_model: $base
        parameters: {density: 0.7, int8_mask: true, lambda: 1.1}
        """,
    "ties with several bases": """
        slices:
        - base_model: $two
          sources:
          - {model: $one, layer_range: [0, 1]}
          - {model: $two, layer_range: [3, 4]}
        - sources:
          - {model: $three, layer_range: [1, 4]}
          - {model: $base, layer_range: [1, 4]}
        merge_method: ties
        base_model: $base
        parameters: {weight: 0.8, density: 0.5, normalize: false, rescale: true}
        """,
    "passthrough, stacked and scaled": """
        slices:
        - sources: [{model: $one, layer_range: [0, 3]}]
        - sources:
          - model: $two
            layer_range: [1, 4]
            parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.5, 1]}, {value: 1}]}
        - sources: [{model: $one, layer_range: [3, 4]}]
        merge_method: passthrough
        """,
}


def typed(text: str, **types: str) -> dict[str, Any]:
    return {**yaml.safe_load(text), **types}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_recipes_merge_to_mergekits_tensors(
    name: str, out_dtype: str | None, float_zoo: Path, tmp_path: Path
) -> None:
    data = typed(FIXED[name], dtype="float32", **({"out_dtype": out_dtype} if out_dtype else {}))
    text = yaml.safe_dump(data).replace("$", f"{float_zoo}/")
    wanted = Recipe.from_yaml(text)
    export_model(wanted, models(wanted), tmp_path / "ours")
    ours = tensors(tmp_path / "ours")
    assert_same(ours, by_mergekit(text, tmp_path / "theirs"), trimmed=trimmed(wanted))
    assert_same(ours, merged(wanted), exact=True)
    # And the YAML we write means the same to mergekit.
    assert_same(ours, by_mergekit(wanted, tmp_path / "rewritten"), trimmed=trimmed(wanted))


@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic at every level", "passthrough, stacked and scaled"]
)
def test_coarse_sources_merge_to_mergekits_tensors(name: str, tiny_zoo: Path, tmp_path: Path) -> None:
    wanted = recipe(typed(FIXED[name], dtype="float32", out_dtype="float16"), tiny_zoo)
    assert_same(merged(wanted), by_mergekit(wanted, tmp_path))


def test_without_dtype_a_passthrough_keeps_the_sources_type(tiny_zoo: Path, tmp_path: Path) -> None:
    wanted = recipe(FIXED["passthrough, stacked and scaled"], tiny_zoo)
    assert_same(merged(wanted), by_mergekit(wanted, tmp_path), exact=True)


@pytest.mark.parametrize("seed", range(40))
def test_random_recipes_merge_to_mergekits_tensors(seed: int, float_zoo: Path, tmp_path: Path) -> None:
    wanted = recipe(random_recipe(random.Random(seed)), float_zoo)
    assert_same(merged(wanted), by_mergekit(wanted, tmp_path), trimmed=trimmed(wanted))


def random_recipe(draw: random.Random) -> dict[str, Any]:
    """Any form, levels, filters and gradients of a deterministic method."""
    method = draw.choice(["linear", "slerp", "task_arithmetic", "ties", "passthrough"])
    names = {
        "density": lambda: round(draw.uniform(0.05, 1), 3),
        "weight": lambda: draw.choice([round(draw.uniform(0.1, 1.5), 3), 1, "5e-1"]),
        "t": lambda: round(draw.uniform(0, 1), 3),
        "scale": lambda: round(draw.uniform(-2, 2), 3),
        "lambda": lambda: round(draw.uniform(0.2, 2), 3),
        "normalize": lambda: draw.choice([True, False, "true", 0]),
        "rescale": lambda: draw.choice([True, False]),
    }
    own = {
        "linear": ["weight"],
        "slerp": [],
        "task_arithmetic": ["weight"],
        "ties": ["weight", "density"],
        "passthrough": ["scale"],
    }[method]
    shared = {
        "linear": ["normalize"],
        "slerp": ["t"],
        "task_arithmetic": ["normalize", "lambda"],
        "ties": ["normalize", "lambda", "rescale"],
        "passthrough": [],
    }[method]

    def setting(name: str) -> Any:
        value = lambda: (  # noqa: E731
            [names[name]() for _ in range(draw.randint(1, 5))] if draw.random() < 0.4 else names[name]()
        )
        if draw.random() < 0.5:
            return value()
        filters = draw.sample(
            ["self_attn", "mlp", "norm", "layers.2.", "embed", "lm_head"], draw.randint(1, 2)
        )
        some = [{"filter": text, "value": value()} for text in filters]
        return [*some, {"value": value()}] if draw.random() < 0.5 else some

    def some(pool: list[str], chance: float) -> dict[str, Any]:
        chosen = {name: setting(name) for name in pool if draw.random() < chance}
        return {"parameters": chosen} if chosen else {}

    others = draw.sample(
        ["$one", "$two", "$three"], 1 if method in ("slerp", "passthrough") else draw.randint(1, 3)
    )
    has_base = method not in ("linear", "passthrough")
    listed = [*others, "$base"] if has_base else list(others)
    draw.shuffle(listed)

    def source(model: str) -> dict[str, Any]:
        return {"model": model, **(some(own, 0.7) if model != "$base" else {})}

    if draw.random() < 0.5:
        pieces = []
        for _ in range(draw.randint(1, 3)):
            length = draw.randint(1, 3)
            sources = []
            for model in listed:
                first = draw.randint(0, 4 - length)
                sources.append({**source(model), "layer_range": [first, first + length]})
            pieces.append({"sources": sources, **some(shared + own, 0.4)})
        form: dict[str, Any] = {"slices": pieces}
    else:
        if has_base and draw.random() < 0.5:
            listed.remove("$base")
        form = {"models": [source(model) for model in listed]}
    if draw.random() < 0.3:
        form = {"modules": {"default": {**form, **some(shared + own, 0.4)}}}
    # What no level says for a tensor: required parameters have a value in the end.
    top = {name: names[name]() for name in ("weight", "t") if name in own + shared}
    result = {
        **form,
        "merge_method": method,
        "dtype": "float32",
        "parameters": {**top, **some(shared, 0.5).get("parameters", {})},
    }
    if "t" in top and not isinstance(result["parameters"]["t"], float):
        result["parameters"]["t"] = top["t"]
    if has_base:
        result["base_model"] = "$base"
    if draw.random() < 0.5:
        result["out_dtype"] = draw.choice(["bfloat16", "float16", "float32"])
    return result


def test_ties_on_continuous_weights_trims_exactly_the_same_elements(float_zoo: Path, tmp_path: Path) -> None:
    """With one source, weight 1 and lambda 1 nothing is rounded twice, so every bit must agree."""
    wanted = recipe(
        "models: [{model: $one, parameters: {weight: 1, density: 0.37}}]\n"
        "merge_method: ties\nbase_model: $base\ndtype: float32\n",
        float_zoo,
    )
    ours, theirs = merged(wanted), by_mergekit(wanted, tmp_path)
    left_open = trimmed(wanted)
    assert_same(ours, theirs, exact=True, trimmed=left_open)
    # Where nothing is open, as in most small tensors, all bits agree; elsewhere as many elements are kept.
    base = tensors(float_zoo / "base")
    numbers = {"ours": 0, "theirs": 0, "open": 0}
    for name, mask in left_open.open.items():
        assert mask.any() or ours[name].equal(theirs[name])
        numbers["ours"] += int((ours[name] != base[name]).sum())
        numbers["theirs"] += int((theirs[name] != base[name]).sum())
        numbers["open"] += int(mask.sum())
    assert abs(numbers["ours"] - numbers["theirs"]) <= 2 * numbers["open"] ** 0.5 + 1
    assert numbers["open"] < 0.01 * numbers["theirs"]


def test_dare_has_mergekits_distribution(float_zoo: Path, tmp_path: Path) -> None:
    """The share of changed elements and the size of the change, over all 47 k weights."""
    wanted = recipe(
        "models:\n- {model: $one, parameters: {weight: 0.7, density: 0.3}}\n"
        "- {model: $two, parameters: {weight: 0.7, density: 0.6}}\n"
        "merge_method: dare_ties\nbase_model: $base\ndtype: float32\n",
        float_zoo,
    )
    torch.manual_seed(1234)
    base = tensors(float_zoo / "base")
    ours, theirs = (
        torch.cat([(found[name] - base[name]).flatten() for name in sorted(base)])
        for found in (merged(wanted), by_mergekit(wanted, tmp_path))
    )
    count = len(ours)
    assert count > 30_000
    shares = [float((delta != 0).float().mean()) for delta in (ours, theirs)]
    assert shares[0] == pytest.approx(1 - 0.7 * 0.4, abs=4 * (0.28 * 0.72 / count) ** 0.5)
    assert shares[0] == pytest.approx(shares[1], abs=6 * (0.28 * 0.72 / count) ** 0.5)
    assert float(ours.abs().mean()) == pytest.approx(float(theirs.abs().mean()), rel=0.03)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.03)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_in_bfloat16_the_error_is_no_larger_than_mergekits(
    method: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    """mergekit computes in bfloat16 here, we in float32. Density 1: trimming has no float64 truth to compare."""
    weights = {"one": 0.37, "two": 0.81, "three": 0.23}
    wanted = recipe(
        {
            "models": [{"model": f"${name}", "parameters": {"weight": w}} for name, w in weights.items()],
            "merge_method": method,
            "base_model": "$base",
            "dtype": "bfloat16",
            "parameters": {"normalize": False},
        },
        tiny_zoo,
    )
    sources = {name: tensors(tiny_zoo / name) for name in ("base", *weights)}
    ours, theirs = merged(wanted), by_mergekit(wanted, tmp_path)
    errors = {"ours": 0.0, "theirs": 0.0}
    for name in ours:
        base = sources["base"][name].double()
        deltas = [weights[other] * (sources[other][name].double() - base) for other in weights]
        total = torch.stack(deltas).sum(0)
        if method == "ties":
            elected = torch.where(total >= 0, 1.0, -1.0)
            total = sum(delta * (delta.sign() == elected) for delta in deltas)  # type: ignore[assignment]
        truth = base + total
        nearest = (truth.bfloat16().double() - truth).abs()
        mine = (ours[name].double() - truth).abs()
        # One rounding of a float32 result: no further from the truth than the nearest number, up to float32 noise.
        assert bool((mine <= nearest + 1e-6).all()), name
        errors["ours"] += float(mine.sum())
        errors["theirs"] += float((theirs[name].double() - truth).abs().sum())
    assert errors["ours"] < errors["theirs"]


@pytest.mark.parametrize("depth", [None, {"blocks": 3}, {"smooth": 3}])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
def test_recipes_of_search_spaces_mean_the_same_to_mergekit(
    depth: dict[str, int] | None, method: str, float_zoo: Path, tmp_path: Path
) -> None:
    searched = {"slerp": "t"}.get(method, "weight")
    space = build_space(
        Document(
            data={
                "type": "parameter",
                "merge_method": method,
                "parameters": {searched: {"low": 0.1, "high": 1.0}},
                "groups": [
                    {"name": "mlp", "filters": ["mlp"]},
                    {"name": "ends", "filters": ["embed", "lm_head"], "depth": False},
                    {"name": "rest"},
                ],
                **({"depth": depth} if depth else {}),
                **({"constants": {"density": 0.5}} if method == "ties" else {}),
            }
        ),
        SourceModels(
            models=tuple(
                f"{float_zoo}/{name}" for name in (["one"] if method == "slerp" else ["one", "two"])
            ),
            base=f"{float_zoo}/base",
            num_layers=4,
            dtype="float32",
        ),
    )
    draw = random.Random(0)
    wanted = space.decode(tuple(draw.uniform(0.1, 1) for _ in space.dimensions))
    assert_same(merged(wanted), by_mergekit(wanted, tmp_path), trimmed=trimmed(wanted))


def test_every_tensor_is_planned_once_and_by_its_own_name(float_zoo: Path) -> None:
    wanted = recipe(FIXED["passthrough, stacked and scaled"], float_zoo)
    sources = models(wanted)
    plan = plan_merge(wanted, sources)
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    assert len(by_name) == len(plan.tensors) == 3 + 9 * 7
    fourth = merge_tensor(by_name["model.layers.3.mlp.down_proj.weight"], sources)
    assert torch.equal(fourth, 0.5 * tensors(float_zoo / "two")["model.layers.1.mlp.down_proj.weight"])
