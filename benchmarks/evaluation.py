"""Scoring one candidate, against `lm_eval.simple_evaluate` over the same live model, tasks and documents.

    python benchmarks/evaluation.py MODEL --tasks A B --include-path DIR [--limit N] [--batch-size N] [--out FILE]

MODEL is the folder of a checkpoint; without arguments it is the quickstart's, so that anyone can run this. Rounds
of all ways of scoring are interleaved, after one of each that does not count. Prints, per way, the median over them:

- wall: seconds of a candidate, from its recipe to its scores; `simple_evaluate` finds the weights in place;
- CPU: seconds in which the process and its children worked, which other programs on the machine move less;
- ratio: `simple_evaluate`'s CPU time to that of this way, per round;
- merging, forward, other: how the wall time divides, in the worker's own account;
- differing: documents whose score is not the one that `simple_evaluate` gives for their task alone; called for
  several tasks it mixes them in its batches, which in bfloat16 may move a score.

Announced numbers have to be the stock command's: the benchmark fails when one differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from table import write_table

from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.documents import split_documents
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.quiet import quiet
from evomerge.recipe import Recipe
from evomerge.records import Outcome, Status
from evomerge.workers.base import Job, WorkerSpec
from evomerge.workers.worker import Worker

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart"
STOCK = "lm_eval.simple_evaluate"
ANNOUNCED = "evomerge, announced numbers"
SEARCH = "evomerge, search"

Scores = Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(kw_only=True)
class Timings:
    """What the rounds of one way took, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=QUICKSTART / "models" / "base")
    parser.add_argument("--tasks", nargs="+", default=["kana_sum", "kana_mirror"])
    parser.add_argument("--include-path", type=Path, default=QUICKSTART / "tasks")
    parser.add_argument("--limit", type=int, default=None, help="documents of each task; all by default")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-fewshot", type=int, default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    settings = EvaluationSettings(
        batch_size=arguments.batch_size, num_fewshot=arguments.num_fewshot, dtype=arguments.dtype
    )
    setup = Setup(arguments.model.resolve(), arguments.tasks, arguments.include_path.resolve(), settings)
    documents = setup.documents(arguments.limit)
    ways: dict[str, Callable[[], tuple[Scores, Mapping[str, float]]]] = {
        STOCK: lambda: setup.stock(documents),
        ANNOUNCED: lambda: setup.candidate(documents),
        SEARCH: lambda: setup.candidate([replace(subset, exact=False) for subset in documents]),
    }
    scores = {name: way()[0] for name, way in ways.items()}
    # A call for all tasks mixes them in its batches; numbers are announced one task at a time.
    alone: Scores = {subset.name: setup.stock([subset])[0][subset.name] for subset in documents}
    differing = {name: differences(found, alone) for name, found in scores.items()}
    if differing[ANNOUNCED]:
        sys.exit(f"{differing[ANNOUNCED]} documents score otherwise than with {STOCK}")
    taken = {name: Timings() for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            found, parts = way()
            taken[name].cpu.append(cpu_seconds() - cpu)
            taken[name].wall.append(time.perf_counter() - wall)
            taken[name].parts.append(parts)
            assert found == scores[name], f"{name} does not score the same model the same way twice"
    count = sum(len(subset.doc_ids) for subset in documents)
    write_table(
        arguments.out,
        command=f"python benchmarks/evaluation.py {' '.join(shown(sys.argv[1:]))}",
        intro=(
            f"{count} documents of {', '.join(arguments.tasks)}, batch size {arguments.batch_size}, "
            f"{next(setup.model.parameters()).dtype}; medians of {arguments.rounds} interleaved rounds."
        ),
        head=["", "wall s", "CPU s", "ratio", "merging", "forward", "other", "differing"],
        rows=[row(name, taken[name], taken[STOCK], differing[name]) for name in ways],
    )


class Setup:
    """A worker with one live model, and lm-eval's own wrapper around that model."""

    def __init__(
        self, folder: Path, tasks: list[str], include_path: Path, settings: EvaluationSettings
    ) -> None:
        import transformers

        self._tasks = tasks
        self._include_path = include_path
        self._settings = settings
        self._library = TaskLibrary(tasks, [include_path], allow_code=False)
        self._worker = Worker(
            WorkerSpec(
                models={"model": folder},
                donor="model",
                tasks=tuple(tasks),
                include_path=(include_path,),
                metrics={name: tuple(self._library.metrics(name)) for name in tasks},
                evaluation=settings,
                device="cpu",
                threads=1,
            )
        )
        self._recipe = Recipe.from_dict(
            {"merge_method": "linear", "models": [{"model": "model", "parameters": {"weight": 1.0}}]}
        )
        self.model = self._worker.live.model
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def documents(self, limit: int | None) -> list[DocumentSet]:
        """The first documents of every task, or all, in the order in which a run takes them."""
        found = []
        for name in self._tasks:
            count = self._library.num_documents(name)
            ids, _ = split_documents(name, count, holdout=0.0, limit=limit)
            found.append(DocumentSet(task=name, doc_ids=ids, name=name, complete=len(ids) == count))
        return found

    def candidate(self, documents: list[DocumentSet]) -> tuple[Scores, Mapping[str, float]]:
        """Score a recipe as a worker of a run does."""
        outcome: Outcome = self._worker.run(Job(number=0, documents=tuple(documents), recipe=self._recipe))
        assert outcome.status is Status.OK, outcome.reason
        return {name: found.values for name, found in outcome.samples.items()}, outcome.seconds

    def stock(self, documents: list[DocumentSet]) -> tuple[Scores, Mapping[str, float]]:
        """Have `simple_evaluate` score the weights that are in place."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        chosen = {subset.task: list(subset.doc_ids) for subset in documents if not subset.complete}
        # Data files are relative to their tasks.
        with quiet(), contextlib.chdir(self._include_path):
            found: dict[str, Any] = lm_eval.simple_evaluate(
                model=HFLM(
                    pretrained=self.model,
                    tokenizer=self._tokenizer,
                    batch_size=self._settings.batch_size,
                    softmax_dtype=self._settings.softmax_dtype,
                ),
                tasks=[subset.task for subset in documents],
                num_fewshot=self._settings.num_fewshot,
                task_manager=TaskManager(include_path=["."], include_defaults=False),
                samples=chosen or None,
            )
        return {
            subset.name: {
                f"{metric},{its_filter}": tuple(
                    float(each[metric])
                    for each in sorted(found["samples"][subset.name], key=lambda each: int(each["doc_id"]))
                    if each["filter"] == its_filter
                )
                for metric, its_filter in self._library.metrics(subset.name)
            }
            for subset in documents
        }, {}


def cpu_seconds() -> float:
    """Time in which this process and its children worked; `simple_evaluate` starts some to describe the machine."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def differences(found: Scores, stock: Scores) -> int:
    """Number of documents that have another score."""
    return sum(
        any(mine != theirs for mine, theirs in zip(row, stock_row, strict=True))
        for name, columns in found.items()
        for row, stock_row in zip(
            zip(*columns.values(), strict=True), zip(*stock[name].values(), strict=True), strict=True
        )
    )


def row(name: str, taken: Timings, stock: Timings, differing: int) -> list[str]:
    """A line of the table."""
    ratio = median(theirs / mine for theirs, mine in zip(stock.cpu, taken.cpu, strict=True))
    shares = ["", "", ""]
    if name != STOCK:
        shares = [
            f"{median(each[part] / each['total'] for each in taken.parts):.1%}"
            for part in ("materialise", "forward", "other")
        ]
    return [
        name,
        f"{median(taken.wall):.2f}",
        f"{median(taken.cpu):.2f}",
        f"{ratio:.2f}",
        *shares,
        str(differing),
    ]


def shown(arguments: list[str]) -> list[str]:
    """The command's arguments without where files lie on this machine."""
    return [Path(text).name if "/" in text else text for text in arguments]


if __name__ == "__main__":
    main()
