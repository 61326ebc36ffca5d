"""A candidate's weights in memory: evomerge against mergekit's own methods on the same tensors.

    python benchmarks/against_mergekit.py [--size 135M] [--out benchmarks/results/against_mergekit.md]

Both are given the same bfloat16 tensors in memory and all threads. mergekit's methods are called tensor by
tensor through its Python interface, in float32 as its YAML's `dtype: float32` does; reading, planning and
writing are left out for mergekit and planning is counted for evomerge. evomerge's statistics are known, as
they are for every candidate of a search but the first; their cost is in the table of `candidate.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from table import write_table
from zoo import NAMES, in_memory, recipe_of

from evomerge.merge.bank import Bank
from evomerge.merge.execute import compute
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe

METHODS = ("linear", "task_arithmetic", "ties", "breadcrumbs_ties", "dare_ties", "model_stock", "della")
REPEATS = 5


def by_mergekit(method: str, tensors: list[torch.Tensor], base: int | None) -> torch.Tensor:
    """One tensor by mergekit, with the parameters of `recipe_of`."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    inputs = range(len(tensors)) if base is None else range(1, len(tensors))
    given = recipe_of(method, {name: name for name in NAMES})["models"][0]["parameters"]
    parameters = {name: dict.fromkeys(inputs, value) for name, value in given.items()}
    group = TensorGroup.from_tensors([tensor.float() for tensor in tensors], base_index=base)
    (merged,) = registry.get(method)([group], parameters=parameters)
    result: torch.Tensor = merged.bfloat16()
    return result


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="135M")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    checkpoints = in_memory(given.size)
    bank = Bank(checkpoints)
    live = {name: tensor.clone() for name, tensor in checkpoints["base"].state.items()}
    rows = []
    for method in METHODS:
        ours = []
        for step in range(REPEATS + 1):
            recipe = Recipe.from_dict(recipe_of(method, {name: name for name in NAMES}, shift=step / 1000))
            started = time.perf_counter()
            plan = plan_merge(recipe, checkpoints)
            wanted = [(tensor_plan, live[tensor_plan.name].view(-1)) for tensor_plan in plan.tensors]
            assert compute(wanted, bank) is None
            ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in live:
                base = None if method == "linear" else 0
                by_mergekit(method, [checkpoints[model].state[name] for model in NAMES], base)
        theirs = time.perf_counter() - started
        median = statistics.median(ours[1:])
        rows.append([method, f"{median:.3f}", f"{theirs:.2f}", f"{theirs / median:.0f}"])
        print(" ".join(rows[-1]), flush=True)
    write_table(
        given.out,
        command=f"python benchmarks/against_mergekit.py --size {given.size}",
        intro=f"One merge of three bfloat16 models of {given.size} parameters and their base, in memory.",
        head=["method", "evomerge s", "mergekit s", "times faster"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
