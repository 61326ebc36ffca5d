"""The batch size that a run fixes rests on the experiment and on what memory the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from evomerge.fitness.stock import AUTO_BATCH_SIZE
from evomerge.plan.batch_size import (
    LARGEST,
    SHARE,
    load_of,
    memory_needs,
    memory_of,
    survey_all,
    with_batch_size,
)
from evomerge.plan.experiment import plan_experiment
from evomerge.prepare import PreparedRun
from tests.plan.conftest import SEARCH, Prepare, measured

AUTO = "evaluation.batch_size=auto"


def has(amount: float) -> Callable[[str], int]:
    return lambda _device: int(amount)


def size_of(prepared: PreparedRun) -> int | str:
    assert prepared.spec.evaluation == prepared.experiment.evaluation
    return prepared.experiment.evaluation.batch_size


def host_needs(prepared: PreparedRun, size: int) -> int:
    settings = prepared.experiment.evaluation.model_copy(update={"batch_size": size})
    fixed = replace(prepared, experiment=prepared.experiment.model_copy(update={"evaluation": settings}))
    return memory_needs(
        fixed, survey_all(fixed), load_of(fixed, (*fixed.search_documents, *fixed.holdout_documents))
    ).host


def test_it_is_the_largest_that_fits_the_share_of_the_memory(prepared: Prepare) -> None:
    # Eighteen requests of the search: of 32 and 16 the longest batches differ, of 64 and 32 they do not.
    run = prepared(SEARCH, AUTO)
    assert size_of(run) == "auto"
    assert size_of(with_batch_size(run, memory=has(1e12))) == LARGEST
    for size in (16, 8, 2):
        needed = host_needs(run, size)
        assert needed > host_needs(run, size // 2)
        assert size_of(with_batch_size(run, memory=has(needed / SHARE + 10))) == size
        assert size_of(with_batch_size(run, memory=has(needed / SHARE - 10))) == size // 2
    assert size_of(with_batch_size(run, memory=has(1000))) == 1


@pytest.mark.parametrize(
    ("workers", "expected"),
    [(["workers.count=2"], 8), (["workers.count=3"], 4), ([], 16)],
    ids=["two workers", "three workers", "inline"],
)
def test_workers_share_the_memory(prepared: Prepare, workers: list[str], expected: int) -> None:
    backend = ["workers.backend=ray"] if workers else []
    run = prepared(SEARCH, AUTO, *backend, *workers)
    enough = {16: 1, 8: 2, 4: 3}[expected] * host_needs(run, expected)
    assert size_of(with_batch_size(run, memory=has(enough / SHARE + 10))) == expected
    assert size_of(with_batch_size(run, memory=has(enough / SHARE - 10))) == expected // 2


def test_what_the_experiment_states_is_kept(prepared: Prepare) -> None:
    run = prepared(SEARCH, "evaluation.batch_size=200")
    assert with_batch_size(run, memory=has(1000)) is run


def test_without_a_gpu_at_hand_or_sizes_in_the_config_it_is_a_constant(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(SEARCH, AUTO)
    assert size_of(with_batch_size(run, memory=has(0))) == AUTO_BATCH_SIZE
    monkeypatch.setattr("evomerge.plan.needs.read_config", lambda _donor: None)
    assert size_of(with_batch_size(run, memory=has(1e12))) == AUTO_BATCH_SIZE


def test_the_memory_is_this_machines() -> None:
    assert 10**8 < memory_of("cpu") < 10**14


def test_a_plan_says_what_a_run_would_take(prepared: Prepare) -> None:
    run = prepared(SEARCH, AUTO)
    assert plan_experiment(run, measured=measured).workers.batch_size == size_of(with_batch_size(run))
    assert plan_experiment(prepared(), measured=measured).workers.batch_size == 4
