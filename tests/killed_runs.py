"""Runs the real controller over a fake pool, kills it at chosen points, and resumes it; a script for test_loop.

    python -m tests.killed_runs FOLDER SEED [racing]

Each run is a fork of this process, which has everything imported but no threads, so that hundreds of runs
take seconds. Nothing here needs torch. Prints one JSON object per line: what an undisturbed run recorded, then
what every killed and resumed run did.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from evomerge import finish, run
from evomerge.errors import EvomergeError
from evomerge.experiment import Experiment
from evomerge.fitness import objectives
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Objective
from evomerge.loop import StopFlag
from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome, Outcome, SampleScores, Status, Trial
from evomerge.run_dir import RunDir
from evomerge.search import build_searcher
from evomerge.search.cma_es import CmaEsOptions
from evomerge.stages import Stage
from evomerge.workers.base import Job

FULL_DISK = "on a full disk"
SOURCES = ("models/one", "models/two", "models/three")
BEST_WEIGHTS = (0.3, 0.9, 0.6)
OBJECTIVES = (Objective(task="t", metric="m", filter="none", weight=1, maximize=True),)
SEARCH = (DocumentSet(task="t", doc_ids=tuple(range(12)), name="t"),)
HOLDOUT = (DocumentSet(task="t", doc_ids=tuple(range(12, 20)), name="t"),)


class WeightSpace:
    """One weight per source."""

    dimensions = tuple(Dimension(name=name, low=0, high=1, start=0.5) for name in SOURCES)

    def decode(self, genome: Genome) -> Recipe:
        return Recipe.from_dict(
            {
                "merge_method": "linear",
                "models": [
                    {"model": name, "parameters": {"weight": weight}}
                    for name, weight in zip(SOURCES, genome, strict=True)
                ],
                "dtype": "float32",
                "out_dtype": "float32",
            }
        )


def weights(recipe: Recipe) -> list[float]:
    listed = recipe.to_dict()["models"]
    return [model["parameters"]["weight"] for model in listed]


def score(job: Job) -> Outcome:
    """A bowl with its top at `BEST_WEIGHTS`; every seventh candidate is invalid."""
    if job.checkpoint is not None:
        recipe_file = job.checkpoint / "recipe.yml"
        # A source model has no recipe of its own.
        height = -1.0 if not recipe_file.exists() else sum(map(ord, recipe_file.read_text())) % 97 / 97
    else:
        assert job.recipe is not None
        if job.number % 7 == 3 and len(job.documents[0].doc_ids) == 12:
            return Outcome(status=Status.INVALID, reason="unlucky number")
        height = -sum((a - b) ** 2 for a, b in zip(weights(job.recipe), BEST_WEIGHTS, strict=False))
    ids = job.documents[0].doc_ids
    values = tuple(height + number / 1000 for number in ids)
    return Outcome(
        status=Status.OK,
        metrics={"t": {"m,none": sum(values) / len(values)}},
        samples={"t": SampleScores(doc_ids=ids, values={"m,none": values})},
    )


class ShufflingPool:
    """Finishes jobs in an order of its own, and writes down which it evaluated."""

    size = 3

    def __init__(self, log: Path, seed: int) -> None:
        self._jobs: list[Job] = []
        self._log = log
        self._rng = random.Random(seed)
        self.events: list[str] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def next(self, timeout: float) -> tuple[int, Outcome] | None:
        job = self._jobs.pop(self._rng.randrange(len(self._jobs)))
        ids = job.documents[0].doc_ids
        documents = "search" if job.documents is SEARCH else f"{ids[0]}+{len(ids)}"
        with self._log.open("a") as file:
            file.write(f"{documents} {job.checkpoint.name if job.checkpoint else job.recipe.hash}\n")
        return job.number, score(job)

    def close(self) -> None:
        self._jobs.clear()


class Silent:
    """An observer."""

    def phase(self, text: str) -> None: ...

    def search(self, dimensions: Sequence[Dimension]) -> None: ...

    def event(self, text: str) -> None: ...

    def trial(self, trial: Trial, **_: Any) -> None: ...


def prepared(
    folder: Path, evaluations: int, *, export: bool = False, stages: int = 1, racing: bool = False
) -> Any:
    searches = [
        {
            "name": f"stage-{number}",
            "search_space": {},
            "search": {"evaluations": evaluations // stages, "seed": 5 + number},
        }
        for number in range(stages)
    ]
    experiment = Experiment.model_validate(
        {
            "name": "killed",
            "models": list(SOURCES),
            "base_model": "models/base",
            "stages": searches,
            "objectives": [{"task": "t", "metric": "m"}],
            "evaluation": {"batch_size": 8, "racing": {"blocks": [0.2, 0.5]} if racing else None},
            "finish": {"baseline_scales": [0.5, 1.0], "export_model": export},
        }
    )
    space = WeightSpace()
    ready = SimpleNamespace(
        experiment=experiment,
        stages=tuple(
            Stage(
                name=search.name,
                space=space,
                new_searcher=partial(
                    build_searcher, "cma-es", space.dimensions, 5 + number, CmaEsOptions(population=6)
                ),
                evaluations=search.search.evaluations,
                first=number * search.search.evaluations,
            )
            for number, search in enumerate(experiment.searches)
        ),
        objectives=OBJECTIVES,
        constraints=(),
        search_documents=SEARCH,
        holdout_documents=HOLDOUT,
        checkpoints={
            name: SimpleNamespace(folder=folder / "none" / name) for name in (*SOURCES, "models/base")
        },
        base="models/base",
        sources=SOURCES,
        library=SimpleNamespace(files={"t": folder / "t.yaml"}),
        spec=SimpleNamespace(device="cpu", threads=1),
        inputs={},
        warnings=(),
    )
    ready.with_winner = lambda stage, folder: ready
    return ready


def fake_export(recipe: Recipe, checkpoints: Any, out_dir: Path, *, merges: Sequence[Recipe]) -> None:
    """Like the real one, atomic, and it takes away what a killed one left."""
    staging = out_dir.with_name(f".{out_dir.name}.staging")
    staging.mkdir(parents=True, exist_ok=True)
    (staging / "recipe.yml").write_text(recipe.to_yaml())
    POINTS.reach("in the export")
    staging.rename(out_dir)


class Points:
    """Counts how often every point is reached, and kills this process at one of them."""

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.fatal: tuple[str, int] | None = None

    def reach(self, name: str) -> bool:
        """Tell whether to die at this point, for points that have something to do before."""
        self.reached[name] += 1
        is_fatal = self.fatal == (name, self.reached[name])
        if is_fatal and name != "during the write":
            os.kill(os.getpid(), signal.SIGKILL)
        return is_fatal


POINTS = Points()


def around(owner: Any, name: str, *, before: str = "", after: str = "") -> None:
    """Put points before and after a function."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*arguments: Any, **named: Any) -> Any:
        if before:
            POINTS.reach(before)
        result = inner(*arguments, **named)
        if after:
            POINTS.reach(after)
        return result

    setattr(owner, name, outer)


def write_in_parts(write: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
    def outer(fd: int, data: Any) -> int:
        if POINTS.reach("during the write"):
            write(fd, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(fd, data)

    return outer


def instrument() -> None:
    from evomerge.journal import Journal
    from evomerge.search.cma_es import CmaEs

    around(CmaEs, "ask", after="after ask")
    around(CmaEs, "tell", before="before tell", after="after tell")
    around(Journal, "append", before="before the record", after="after the record")
    around(RunDir, "write_scores", before="before the scores")
    around(RunDir, "write_status", before="before the status")
    around(os, "fsync", before="before fsync")
    around(shutil, "rmtree", before="before removing the checkpoint", after="after removing the checkpoint")
    objectives.NUM_PERMUTATIONS = 200
    prepared(Path(), 1).stages[0].new_searcher()  # imports cma, which takes longer than a run
    os.write = write_in_parts(os.write)  # type: ignore[assignment]
    finish.export_model = fake_export  # type: ignore[attr-defined]
    run.export_model = fake_export  # type: ignore[attr-defined]


def controller(folder: Path, log: Path, order: int, *, evaluations: int, export: bool, racing: bool) -> None:
    """What `evomerge run` does in a new folder, and `evomerge resume` in another."""
    ready = prepared(folder, evaluations, export=export, stages=2, racing=racing)
    run.prepare = lambda *_, **__: ready  # type: ignore[attr-defined]
    run._start_pool = lambda *_: ShufflingPool(log, order)  # type: ignore[assignment]
    journal = folder / "run" / "journal.jsonl"
    if journal.exists() and journal.stat().st_size:
        run.resume_run(folder / "run", observer=Silent(), stop=StopFlag())
    else:
        run.start_run(folder, folder / "run", observer=Silent(), stop=StopFlag())


def forked(task: Callable[[], None]) -> int:
    """Run a function in a fork; return its exit code, negative for a signal."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            task()
            code = 0
        except EvomergeError as error:
            traceback.print_exc()
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def recorded(folder: Path) -> dict[str, Any]:
    from evomerge.journal import Journal

    journal = Journal.load(folder / "run" / "journal.jsonl")
    trials = sorted(journal.trials, key=lambda trial: trial.number)
    status = folder / "run" / "status.json"
    best = folder / "run" / "best" / "recipe.yml"
    return {
        "trials": [
            [t.number, t.candidate, t.genome, t.asked_after, t.status, t.fitness, t.metrics] for t in trials
        ],
        "blocks": len(journal.blocks),
        "finals": sorted([f.name, f.stage, f.candidate, f.metrics] for f in journal.finals),
        "status": json.loads(status.read_text()) if status.exists() else None,
        "best": best.read_text() if best.exists() else None,
        "left": sorted(path.name for path in (folder / "run").glob("best/*")) if best.parent.exists() else [],
    }


def num_scored(finals: Sequence[Sequence[Any]]) -> int:
    """How many evaluations there are beside the search; the naming of the winner is none."""
    return sum((final[0], final[1]) != ("winner", "confirm") for final in finals)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main(folder: Path, seed: int, *, racing: bool) -> Iterator[dict[str, Any]]:
    instrument()
    options: dict[str, Any] = {"evaluations": 32, "export": False, "racing": racing}
    reached = folder / "reached"

    def undisturbed() -> None:
        controller(folder / "whole", folder / "whole.log", 0, **options)
        reached.write_text(json.dumps(POINTS.reached))

    (folder / "whole").mkdir()
    code = forked(undisturbed)
    yield {"code": code, **recorded(folder / "whole"), "evaluated": lines(folder / "whole.log")}

    rng = random.Random(seed)
    counts = json.loads(reached.read_text())
    points = [
        (name, number)
        for name, count in sorted(counts.items())
        for number in sorted({1, count, *rng.sample(range(1, count + 1), min(2, count))})
        if (name, number) != ("during the write", 1)  # a run without a header never started
    ]
    points += [(FULL_DISK, size) for size in (2_500, 5_000, 12_000)]
    for index, point in enumerate(points):
        here = folder / str(index)
        here.mkdir()

        def killed(here: Path = here, index: int = index, point: tuple[str, int] = point) -> None:
            if point[0] == FULL_DISK:  # no file may grow beyond so many bytes
                resource.setrlimit(resource.RLIMIT_FSIZE, (point[1], point[1]))
            POINTS.fatal = point
            controller(here, here / "killed.log", index, **options)

        def resumed(here: Path = here, index: int = index) -> None:
            controller(here, here / "resumed.log", 1000 + index, **options)

        killed_code = forked(killed)
        before: dict[str, Any] = {"trials": [], "finals": [], "blocks": 0}
        with contextlib.suppress(EvomergeError):  # it may have died before there was a journal
            before = recorded(here)
        resumed_code = forked(resumed)
        yield {
            "point": point,
            "codes": [killed_code, resumed_code],
            "recorded": [f"search {trial[1]}" for trial in before["trials"]],
            "recorded_blocks": before["blocks"],
            "recorded_finals": num_scored(before["finals"]),
            "evaluated": lines(here / "resumed.log"),
            **recorded(here),
        }


if __name__ == "__main__":
    for report in main(Path(sys.argv[1]), int(sys.argv[2]), racing=sys.argv[3:] == ["racing"]):
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
