"""From disk to disk: `evomerge merge` against `mergekit-yaml`, whole processes.

    python benchmarks/merge_command.py FOLDER [--size 135M] [--out benchmarks/results/merge_command.md]

FOLDER takes the models and the results, several gigabytes. Every command runs in a process of its own, turn by
turn, after one round that is not counted: it fills the page cache, compiles evomerge's kernels, and writes the byte
code of a checkout, which pip would write for a package. Peak memory is the largest resident set of the process,
mapped pages of the sources included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import yaml
from table import write_table
from zoo import NAMES, num_bytes, on_disk, recipe_of

METHODS = ("linear", "ties")


# A process inherits the peak of the one that starts it: hence one between that is small.
MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000)
sys.exit(code)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a process that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds, megabytes = done.stdout.split()
    return float(seconds), float(megabytes)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="135M")
    parser.add_argument("--budget", help="memory budget of a further run, such as 200MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    models = on_disk(given.size, given.folder)
    names = {name: str(models / name) for name in NAMES}
    bin_folder = Path(sys.executable).parent
    out = given.folder / "out"
    rows = []
    for method in METHODS:
        recipe = given.folder / f"{method}.yml"
        recipe.write_text(yaml.safe_dump(recipe_of(method, names)))
        ours = [str(bin_folder / "evomerge"), "merge", str(recipe), str(out)]
        commands = {
            "evomerge merge": ours,
            "mergekit-yaml": [str(bin_folder / "mergekit-yaml"), str(recipe), str(out)],
        }
        if given.budget:
            commands[f"evomerge merge --memory-budget {given.budget}"] = [
                *ours,
                "--memory-budget",
                given.budget,
            ]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.rounds + 1):
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                found[name].append(run(command))
        theirs = statistics.median(seconds for seconds, _ in found["mergekit-yaml"][1:])
        for name, runs in found.items():
            seconds = statistics.median(seconds for seconds, _ in runs[1:])
            peak = max(megabytes for _, megabytes in runs[1:])
            rows.append([method, name, f"{seconds:.2f}", f"{theirs / seconds:.1f}", f"{peak:.0f}"])
            print(" ".join(rows[-1]), flush=True)
    shutil.rmtree(out, ignore_errors=True)
    write_table(
        given.out,
        command=f"python benchmarks/merge_command.py FOLDER --size {given.size}",
        intro=(
            f"Three models of {given.size} parameters and their base, {num_bytes(given.size) / 1e6:.0f} MB each, "
            f"merged from disk to disk; medians of {given.rounds} runs."
        ),
        head=["method", "command", "seconds", "times faster than mergekit", "peak MB"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
