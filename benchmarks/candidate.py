"""How fast a candidate's weights are written: bytes read and written per second, against a plain copy.

    python benchmarks/candidate.py [--sizes 135M 1B] [--device cuda] [--out benchmarks/results/candidate.md]

Three bfloat16 models and their base lie in memory, with their statistics. A candidate is everything from a
recipe to finished weights: planning, scalar work per tensor, the kernels. The copy is torch's, of one large
bfloat16 tensor on all threads, measured in the same run before and after every method.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from table import write_table
from zoo import in_memory, num_bytes, recipe_of

from evomerge.merge.bank import Bank
from evomerge.merge.execute import compute
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe

METHODS = (
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "breadcrumbs_ties",
    "dare_ties",
    "della",
    "karcher",
    "model_stock",
)
REPEATS = 25


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call, the device's work included."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(size: str, device: str, skip: list[str]) -> list[list[str]]:
    """One row per method."""
    checkpoints = in_memory(size)
    bank = Bank(checkpoints, device=device)
    live = {name: tensor.to(device).clone() for name, tensor in checkpoints["base"].state.items()}
    source = torch.cat([tensor.view(-1) for tensor in live.values()])
    target = torch.empty_like(source)
    names = {name: name for name in checkpoints}
    rows = []
    for method in (method for method in METHODS if method not in skip):

        def candidate(step: int, method: str = method) -> tuple[float, float]:
            recipe = Recipe.from_dict(recipe_of(method, names, shift=step / 1000))
            started = time.perf_counter()
            plan = plan_merge(recipe, checkpoints)
            planned = time.perf_counter()
            wanted = [(tensor_plan, live[tensor_plan.name].view(-1)) for tensor_plan in plan.tensors]
            assert compute(wanted, bank) is None
            return started, planned

        first = seconds(lambda: candidate(0), device)
        copies, merges, plans = [], [], []
        for step in range(1, REPEATS + 1):
            copies.append(seconds(lambda: target.copy_(source), device))
            began = time.perf_counter()
            started, planned = candidate(step)
            if device != "cpu":
                torch.cuda.synchronize()
            merges.append(time.perf_counter() - began)
            plans.append(planned - started)
        num_models = 2 if method == "slerp" else 4
        copied = 2 * num_bytes(size) / statistics.median(copies)
        merged = (num_models + 1) * num_bytes(size) / statistics.median(merges)
        rows.append(
            [
                size,
                method,
                f"{first:.2f}",
                f"{statistics.median(merges):.3f}",
                f"{statistics.median(plans):.3f}",
                f"{merged / 1e9:.1f}",
                f"{copied / 1e9:.1f}",
                f"{merged / copied:.2f}",
            ]
        )
        print(" ".join(rows[-1]), flush=True)
        gc.collect()
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["135M"])
    parser.add_argument("--skip", nargs="*", default=[], help="methods to leave out; della at 1B takes 24 GB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = [row for size in given.sizes for row in measure(size, given.device, given.skip)]
    write_table(
        given.out,
        command=f"python benchmarks/candidate.py --sizes {' '.join(given.sizes)} --device {given.device}"
        + (f" --skip {' '.join(given.skip)}" if given.skip else ""),
        intro=(
            "Writing a candidate: three bfloat16 models and their base (slerp: one model and the base). 'First' "
            "computes the statistics as well and loads compiled code, the others are medians of "
            f"{REPEATS} candidates; planning is part of the time."
        ),
        head=[
            "model",
            "method",
            "first s",
            "candidate s",
            "of which planning s",
            "GB/s",
            "copy GB/s",
            "ratio",
        ],
        rows=rows,
        device=given.device,
    )


if __name__ == "__main__":
    main()
