"""A worker whose functions misbehave still scores the next candidate right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import FitnessError
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.objectives import Measure
from evomerge.fitness.user_code import survey
from evomerge.measure_settings import FunctionSettings, JudgeSettings
from evomerge.recipe import Recipe
from evomerge.records import Status
from evomerge.workers.base import Job, WorkerSpec
from evomerge.workers.worker import Worker
from tests.judges import Answer, serving
from tests.workers.test_worker import content, recipe

SPOIL = """\
from pathlib import Path

def spoil(model, tokenizer, documents):
    switch = Path(__file__).with_name("spoil")
    if switch.exists():
        switch.unlink()
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        model.config.rms_norm_eps = 0.5
    return [0.0] * len(documents)
"""

DOCUMENTS = (DocumentSet(task="choose", doc_ids=tuple(range(8)), name="choose", complete=True),)
PATH = Recipe.from_dict(
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "one", "layer_range": [0, 2]}]},
            {"sources": [{"model": "two", "layer_range": [1, 4]}]},
        ],
    }
)


@pytest.fixture
def spoilable(spec: WorkerSpec, tmp_path: Path) -> WorkerSpec:
    (tmp_path / "own_spoil.py").write_text(SPOIL)
    own = FunctionSettings(name="own_spoil:spoil", given="model")
    measure = Measure(task="choose", metric="own_spoil:spoil", filter="evomerge", maximize=True, own=own)
    return replace(
        spec,
        metrics={"choose": (("acc", "none"), ("acc_norm", "none"), ("own_spoil:spoil", "evomerge"))},
        own=(measure,),
        code=survey(["own_spoil:spoil"], tmp_path),
    )


@pytest.mark.parametrize("wanted", [recipe(0.5), PATH], ids=["merge", "path"])
def test_a_function_that_changed_the_model_spoils_no_other_candidate(
    spoilable: WorkerSpec, tmp_path: Path, wanted: Recipe
) -> None:
    """Layers of a path are the sources' own memory, so the sources are mapped anew."""
    worker = Worker(spoilable)
    job = Job(number=0, documents=DOCUMENTS, recipe=wanted)
    expected = content(worker.run(job))
    (tmp_path / "spoil").touch()
    spoilt = worker.run(job)
    assert spoilt.status is Status.INVALID
    assert "own_spoil:spoil changed the model (" in spoilt.reason
    assert content(worker.run(job)) == expected
    other = replace(job, recipe=recipe(0.3))
    assert content(worker.run(other)) == content(Worker(spoilable).run(other))


def test_a_worker_loads_no_other_code_than_the_run_started_with(
    spoilable: WorkerSpec, tmp_path: Path
) -> None:
    (tmp_path / "own_spoil.py").write_text(SPOIL + "\n")
    with pytest.raises(FitnessError, match=r"own_spoil\.py changed since the run started"):
        Worker(spoilable)
    with pytest.raises(AssertionError, match="only with permission"):
        Worker(replace(spoilable, code=None))


def test_a_candidate_that_no_judge_could_mark_is_neither_invalid_nor_failed(spec: WorkerSpec) -> None:
    with serving(lambda _: Answer(status=503, body=b"")) as server:
        own = JudgeSettings(url=server.url, model="m", prompt="{{generation}}", scale=(1, 10), retries=0)
        measure = Measure(task="gen", metric="judge m", filter="evomerge", maximize=True, own=own)
        worker = Worker(replace(spec, metrics={"gen": (("judge m", "evomerge"),)}, own=(measure,)))
        documents = (DocumentSet(task="gen", doc_ids=(0, 2), name="gen"),)
        outcome = worker.run(Job(number=0, documents=documents, recipe=recipe(0.5)))
    assert outcome.status is Status.UNAVAILABLE
    assert "the judge m at" in outcome.reason
    assert not outcome.metrics
