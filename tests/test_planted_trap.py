"""A candidate that is better on the search documents by chance only is not announced as a win, a better one is.

Whole runs, from the search to the verdict, over a fake pool: models answer each document right by a chance that
depends on their ability and the document's difficulty, and on nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evomerge.fitness import objectives
from evomerge.fitness.base import DocumentSet
from evomerge.records import Outcome, SampleScores, Status
from evomerge.run import RunResult
from evomerge.workers.base import Job
from tests.killed_runs import prepared, weights
from tests.test_finish import Controller

NUM_RUNS = 40
NUM_SEARCH = 60
NUM_HOLDOUT = 80


class Examination:
    """Answers of models whose abilities are known.

    Args:
        seed: Seed of all answers.
        merged: Ability of every candidate, in logits; the source models `one` and `two` have 0, all others -1.
    """

    def __init__(self, seed: int, merged: float) -> None:
        self._seed = seed
        self._merged = merged
        self._difficulty = np.random.default_rng(seed).normal(0.0, 1.5, NUM_SEARCH + NUM_HOLDOUT)

    def sit(self, job: Job) -> Outcome:
        """The outcome of a job."""
        (subset,) = job.documents
        right = self.right(job)[list(subset.doc_ids)]
        samples = SampleScores(doc_ids=subset.doc_ids, values={"m,none": tuple(right.tolist())})
        return Outcome(
            status=Status.OK, metrics={"t": {"m,none": float(right.mean())}}, samples={"t": samples}
        )

    def right(self, job: Job) -> np.ndarray:
        """Which documents a model answers right; the same for a candidate and its checkpoint."""
        name, ability = self._model(job)
        rng = np.random.default_rng([self._seed, *name.encode()])
        chance = 1 / (1 + np.exp(self._difficulty - ability))
        return (rng.random(len(chance)) < chance).astype(float)

    def _model(self, job: Job) -> tuple[str, float]:
        if job.recipe is not None:
            # The baselines are task arithmetic with one scale, and the average.
            is_candidate = len(set(weights(job.recipe))) > 1
            return job.recipe.to_yaml(), self._merged if is_candidate else -1.0
        assert job.checkpoint is not None
        recipe_file = job.checkpoint / "recipe.yml"
        if recipe_file.exists():
            return recipe_file.read_text(), self._merged
        return job.checkpoint.name, 0.0 if job.checkpoint.name in ("one", "two") else -1.0


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(objectives, "NUM_PERMUTATIONS", 1000)
    memory = Path("/dev/shm")  # runs write every record through, which costs nothing in memory
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, examination: Examination, racing: bool) -> RunResult:
    folder.mkdir()
    controller = Controller(folder, monkeypatch)
    controller.ready = prepared(folder, 36, racing=racing)
    controller.ready.search_documents = (DocumentSet(task="t", doc_ids=tuple(range(NUM_SEARCH)), name="t"),)
    held_out = tuple(range(NUM_SEARCH, NUM_SEARCH + NUM_HOLDOUT))
    controller.ready.holdout_documents = (DocumentSet(task="t", doc_ids=held_out, name="t"),)
    controller.decide = examination.sit
    return controller.start()


def test_luck_on_the_search_documents_is_not_announced(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leads, verdicts = [], []
    for seed in range(NUM_RUNS):
        examination = Examination(seed, merged=0.0)
        result = run(scratch / str(seed), monkeypatch, examination, racing=seed % 2 == 1)
        source = examination.right(Job(number=0, documents=(), checkpoint=Path("one")))[:NUM_SEARCH].mean()
        leads.append(result.best.metrics["t"]["m,none"] - source)
        assert result.holdout is not None
        verdicts.append(result.holdout.verdict)
    # All candidates equal the best source: the search finds one that looks better all the same.
    assert np.mean(np.array(leads) > 0) > 0.9
    assert np.mean(leads) > 0.1
    announced = [verdict for verdict in verdicts if "the winner beats" in verdict]
    assert len(announced) <= 0.05 * NUM_RUNS
    others = {verdict for verdict in verdicts if "NOT" in verdict}
    assert len(announced) + sum(verdict in others for verdict in verdicts) == NUM_RUNS


def test_what_is_better_in_truth_is_announced(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = 0
    for seed in range(12):
        result = run(scratch / str(seed), monkeypatch, Examination(seed, merged=2.5), racing=seed % 2 == 1)
        assert result.holdout is not None
        announced += "the winner beats" in result.holdout.verdict
    assert announced >= 11
