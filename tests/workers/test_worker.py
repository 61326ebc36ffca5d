"""A worker scores what a recipe says, whatever it scored before, and says what went wrong otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import TaskError
from evomerge.fitness.base import DocumentSet, Scores
from evomerge.fitness.fake import FakeEvaluator
from evomerge.merge.export import export_model
from evomerge.recipe import Recipe
from evomerge.records import Outcome, Status
from evomerge.workers import DeferredPool, worker_memory
from evomerge.workers.base import Job, WorkerPool, WorkerSpec
from evomerge.workers.inline import InlinePool
from evomerge.workers.worker import Worker, load_model
from tests.merge.models import variant
from tests.tiny import make_model

DOCUMENTS = (
    DocumentSet(task="gen", doc_ids=(0, 2, 3), name="gen"),
    DocumentSet(task="choose", doc_ids=tuple(range(8)), name="choose", complete=True),
)


def recipe(weight: float, *, out_dtype: str = "bfloat16", **more: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [
                {"model": "one", "parameters": {"weight": weight}},
                {"model": "two", "parameters": {"weight": 1 - weight}},
            ],
            "dtype": "float32",
            "out_dtype": out_dtype,
            **more,
        }
    )


TOO_LONG = Recipe.from_dict(
    {"merge_method": "passthrough", "slices": [{"sources": [{"model": "one", "layer_range": [0, 9]}]}]}
)


def recipe_jobs(spec: WorkerSpec, weights: list[float]) -> list[Job]:
    return [
        Job(number=number, documents=DOCUMENTS, recipe=recipe(weight))
        for number, weight in enumerate(weights)
    ]


def content(outcome: Outcome) -> tuple[Any, ...]:
    assert outcome.status is Status.OK, outcome.reason
    return outcome.metrics, outcome.samples, outcome.counts


@pytest.fixture(scope="module")
def worker(spec: WorkerSpec) -> Worker:
    """With lm-eval."""
    return Worker(spec)


@pytest.fixture(scope="module")
def fake_worker(spec: WorkerSpec) -> Worker:
    return Worker(spec, lambda model, _tokenizer: FakeEvaluator(model, spec.metrics))


def score(worker: Worker, what: Recipe | Path) -> Outcome:
    if isinstance(what, Path):
        return worker.run(Job(number=0, documents=DOCUMENTS, checkpoint=what))
    return worker.run(Job(number=0, documents=DOCUMENTS, recipe=what))


@pytest.mark.parametrize("kind", ["worker", "fake_worker"])
def test_scores_depend_on_the_recipe_alone(kind: str, request: pytest.FixtureRequest) -> None:
    worker: Worker = request.getfixturevalue(kind)
    found = []
    for weight in (0.1, 3.0, 0.1):
        worker.live.poison()
        found.append(content(score(worker, recipe(weight))))
    assert found[0] == found[2]
    assert found[0] != found[1]


def test_the_seconds_of_the_phases_add_up(worker: Worker) -> None:
    seconds = score(worker, recipe(0.5)).seconds
    assert set(seconds) == {"materialise", "forward", "other", "total"}
    assert all(value > 0 for value in seconds.values())
    assert seconds["total"] == pytest.approx(
        seconds["materialise"] + seconds["forward"] + seconds["other"], abs=1e-9
    )


@pytest.mark.parametrize("kind", ["worker", "fake_worker"])
def test_a_checkpoint_scores_as_its_recipe_does_live(
    kind: str, request: pytest.FixtureRequest, spec: WorkerSpec, tmp_path: Path
) -> None:
    worker: Worker = request.getfixturevalue(kind)
    checkpoints = {name: Checkpoint.open(folder) for name, folder in spec.models.items()}
    export_model(recipe(0.7), checkpoints, tmp_path / "model")
    live = content(score(worker, recipe(0.7)))
    assert content(score(worker, tmp_path / "model")) == live
    assert content(score(worker, recipe(0.7))) == live
    seconds = score(worker, tmp_path / "model").seconds
    assert seconds["total"] == pytest.approx(
        seconds["materialise"] + seconds["forward"] + seconds["other"], abs=1e-9
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (recipe(1e300), "NaN or infinity"),
        (TOO_LONG, "layer"),
    ],
    ids=["overflow", "layers that do not exist"],
)
def test_a_candidate_that_cannot_be_merged_is_invalid_with_its_reason(
    worker: Worker, bad: Recipe, reason: str
) -> None:
    before = content(score(worker, recipe(0.2)))
    outcome = score(worker, bad)
    assert outcome.status is Status.INVALID
    assert reason in outcome.reason
    assert outcome.metrics == {}
    assert outcome.samples == {}
    assert outcome.seconds["total"] > 0
    assert content(score(worker, recipe(0.2))) == before


def test_one_nan_in_a_source_makes_the_candidate_invalid(spec: WorkerSpec, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "broken", seed=1)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    worker = Worker(replace(spec, models={**spec.models, "one": folder}))
    outcome = score(worker, recipe(0.5))
    assert outcome.status is Status.INVALID
    assert "model.layers.2.mlp.up_proj.weight" in outcome.reason
    assert score(worker, recipe(0.0)).status is Status.INVALID  # 0 times NaN is NaN
    checkpoint = score(worker, folder)
    assert checkpoint.status is Status.INVALID
    assert "logits" in checkpoint.reason


def test_a_checkpoint_that_cannot_be_loaded_fails_alone(worker: Worker, tmp_path: Path) -> None:
    before = content(score(worker, recipe(0.2)))
    outcome = score(worker, tmp_path / "nowhere")
    assert outcome.status is Status.FAILED
    assert "nowhere" in outcome.reason
    assert content(score(worker, recipe(0.2))) == before


def along(hops: list[tuple[str, int]], scale: float = 1.0, **more: Any) -> Recipe:
    """A path of layers; the scale is that of all that is written to the residual stream."""
    writers = ("o_proj", "down_proj", "embed_tokens")
    setting = [*({"filter": name, "value": scale} for name in writers), {"value": 1.0}]
    parameters = {} if scale == 1 else {"parameters": {"scale": setting}}
    slices = [{"sources": [{"model": m, "layer_range": [i, i + 1], **parameters}]} for m, i in hops]
    settings = {"merge_method": "passthrough", "dtype": "float32", "out_dtype": "bfloat16", "slices": slices}
    return Recipe.from_dict({**settings, **more})


def merged_along(hops: list[int]) -> Recipe:
    slices = [
        {"sources": [{"model": model, "layer_range": [i, i + 1]} for model in ("base", "one", "two")]}
        for i in hops
    ]
    more = {"models": None, "slices": slices, "parameters": {"weight": 0.5}}
    values = {key: value for key, value in (recipe(0.5).to_dict() | more).items() if value is not None}
    return Recipe.from_dict(values)


LONG = along([("one", 0), ("two", 1), ("one", 2), ("two", 1), ("one", 1), ("two", 3), ("one", 3)])
SHORT = along([("two", 3), ("one", 1)])


@pytest.mark.parametrize("wanted", [LONG, SHORT, merged_along([0, 2, 1, 1, 3, 3]), merged_along([1, 3])])
def test_recipes_of_other_depths_score_as_their_checkpoints_do(
    worker: Worker, wanted: Recipe, spec: WorkerSpec, tmp_path: Path
) -> None:
    """lm-eval is bound to one model, whose number of layers changes."""
    checkpoints = {name: Checkpoint.open(folder) for name, folder in spec.models.items()}
    export_model(wanted, checkpoints, tmp_path / "model")
    live = score(worker, wanted)
    assert content(score(worker, tmp_path / "model")) == content(live)
    assert live.seconds["total"] == pytest.approx(
        live.seconds["materialise"] + live.seconds["forward"] + live.seconds["other"], abs=1e-9
    )


def test_a_path_with_scales_scores_as_its_checkpoint_does(spec: WorkerSpec, tmp_path: Path) -> None:
    """In float32, where scaling weights and scaling results is the same."""
    wide = replace(spec, evaluation=spec.evaluation.model_copy(update={"dtype": "float32"}))
    worker = Worker(wide)
    wanted = along([("one", 0), ("two", 1), ("one", 2), ("two", 1)], -0.7, out_dtype="float32")
    checkpoints = {name: Checkpoint.open(folder) for name, folder in spec.models.items()}
    export_model(wanted, checkpoints, tmp_path / "model")
    live = content(score(worker, wanted))
    assert content(score(worker, tmp_path / "model")) == live
    assert live != content(score(worker, along([("one", 0), ("two", 1), ("one", 2), ("two", 1)])))


def test_the_fastest_way_of_scoring_gives_the_same_scores_in_float32(spec: WorkerSpec) -> None:
    """Also where the number of layers changes from one candidate to the next."""
    worker = Worker(replace(spec, evaluation=spec.evaluation.model_copy(update={"dtype": "float32"})))
    fast = tuple(replace(subset, exact=False) for subset in DOCUMENTS)
    for wanted in (LONG, SHORT, recipe(0.3, out_dtype="float32"), LONG):
        outcome = worker.run(Job(number=0, documents=fast, recipe=wanted))
        assert content(outcome) == content(score(worker, wanted))


@pytest.mark.parametrize("kind", ["worker", "fake_worker"])
def test_scores_depend_on_the_recipe_alone_across_kinds_of_recipes(
    kind: str, request: pytest.FixtureRequest
) -> None:
    worker: Worker = request.getfixturevalue(kind)
    scaled = along([("one", 0), ("one", 0), ("two", 3)], 3.0)
    recipes = [LONG, recipe(0.3), merged_along([0, 1, 2, 3, 3, 3]), SHORT, scaled, recipe(2.0)]
    order = [0, 1, 2, 3, 4, 5, 0, 4, 2, 5, 1, 3, 3, 0]
    found: dict[int, list[Any]] = {}
    for index in order:
        worker.live.poison()
        found.setdefault(index, []).append(content(score(worker, recipes[index])))
    assert all(outcome == outcomes[0] for outcomes in found.values() for outcome in outcomes)
    assert len({str(outcomes[0]) for outcomes in found.values()}) > 4


def test_a_worker_holds_only_the_live_model_that_its_recipes_need(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.workers import worker as module

    loaded = []
    monkeypatch.setattr(module, "load_model", lambda *given: loaded.append(given) or load_model(*given))
    for kinds, expected in (([SHORT, LONG], 1), ([recipe(0.1), recipe(0.2)], 1), ([SHORT, recipe(0.1)], 2)):
        worker = fake(spec)
        assert loaded == []
        for wanted in kinds + kinds:
            assert score(worker, wanted).status is Status.OK
        assert len(loaded) == expected
        loaded.clear()


class _Raises:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def evaluate(self, documents: Any) -> Scores:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("too much"), Status.FAILED),
        (RuntimeError("CUDA out of memory"), Status.FAILED),
        (KeyError("a bug"), Status.FAILED),
        (TaskError("no number per document"), Status.INVALID),
    ],
)
def test_what_an_evaluator_raises_becomes_the_outcome(
    spec: WorkerSpec, error: Exception, status: Status
) -> None:
    worker = Worker(spec, lambda _model, _tokenizer: _Raises(error))
    outcome = score(worker, recipe(0.5))
    assert outcome.status is status
    assert str(error) in outcome.reason
    if status is Status.FAILED:
        assert type(error).__name__ in outcome.reason
        assert "test_worker.py:" in outcome.reason


def test_the_live_model_is_of_the_wanted_type(spec: WorkerSpec) -> None:
    evaluation = spec.evaluation.model_copy(update={"dtype": "float32"})
    worker = Worker(replace(spec, evaluation=evaluation), lambda model, _: FakeEvaluator(model, spec.metrics))
    assert next(worker.live.model.parameters()).dtype == torch.float32


def test_an_inline_pool_runs_jobs_in_order_when_asked(fake_worker: Worker, spec: WorkerSpec) -> None:
    pool: WorkerPool = InlinePool(fake_worker)
    for job in recipe_jobs(spec, [0.1, 0.2]):
        pool.submit(job)
    finished = [pool.next(0.0), pool.next(0.0), pool.next(0.0)]
    assert [entry and entry[0] for entry in finished] == [0, 1, None]
    assert pool.size == 1
    pool.submit(recipe_jobs(spec, [0.1])[0])
    pool.close()
    assert pool.next(0.0) is None


def test_a_deferred_pool_starts_with_the_first_job(fake_worker: Worker, spec: WorkerSpec) -> None:
    started = []

    def start() -> WorkerPool:
        started.append(InlinePool(fake_worker))
        return started[-1]

    pool: WorkerPool = DeferredPool(start)
    assert (pool.next(0.0), pool.size, pool.events, started) == (None, 0, [], [])
    for job in recipe_jobs(spec, [0.1, 0.2]):
        pool.submit(job)
    assert len(started) == 1
    assert pool.size == 1
    assert [(pool.next(0.0) or (None,))[0] for _ in range(3)] == [0, 1, None]
    pool.close()
    DeferredPool(start).close()
    assert len(started) == 1


def test_a_worker_needs_room_for_two_models_or_for_merging() -> None:
    small_tensors = worker_memory([10] * 100, itemsize=2, num_models=3)
    assert small_tensors == 2 * 2000
    one_tensor = worker_memory([1000], itemsize=2, num_models=3)
    assert one_tensor == 2000 + 1000 * 4 * 9


def test_metrics_are_plain_mappings_that_travel_between_processes(fake_worker: Worker) -> None:
    import pickle

    outcome = score(fake_worker, recipe(0.5))
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    assert isinstance(outcome.metrics, Mapping)


TIES = Recipe.from_dict(
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.5, "density": 0.4}} for name in ("one", "two")],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
)


def fake(spec: WorkerSpec) -> Worker:
    return Worker(spec, lambda model, _tokenizer: FakeEvaluator(model, spec.metrics))


def test_statistics_of_the_sources_are_computed_once_for_all_workers_of_a_run(
    spec: WorkerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(spec, statistics=tmp_path / "statistics")
    job = Job(number=0, documents=DOCUMENTS, recipe=TIES)
    first = fake(kept).run(job)
    assert len(list(kept.statistics.rglob("*.npy"))) > 2  # type: ignore[union-attr]

    def no_histogram(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("evomerge.merge.kernels.cpu.histogram", no_histogram)
    assert content(fake(kept).run(job)) == content(first)
    assert fake(spec).run(job).status is Status.FAILED  # without the folder it has to


def test_a_memory_budget_changes_no_score(spec: WorkerSpec) -> None:
    job = Job(number=0, documents=DOCUMENTS, recipe=TIES)
    assert content(fake(replace(spec, memory_budget=1)).run(job)) == content(fake(spec).run(job))


def test_nan_in_a_source_makes_the_candidate_invalid_and_is_named(spec: WorkerSpec, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[name][0, 0] = float("nan")

    spoilt = variant(Path(spec.models["two"]), tmp_path / "two", change=spoil)
    damaged = replace(spec, models={**spec.models, "two": spoilt})
    outcome = fake(damaged).run(Job(number=0, documents=DOCUMENTS, recipe=recipe(0.5)))
    assert outcome.status is Status.INVALID
    assert f"as {name} of two does" in outcome.reason
