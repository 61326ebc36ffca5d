"""The model of times, by hand."""

from __future__ import annotations

import pytest

from evomerge.plan.header_bank import Statistic
from evomerge.plan.records import Machine, Span
from evomerge.plan.times import (
    CALLS_PER_LAYER,
    CALLS_PER_REQUEST,
    CALLS_PER_TOKEN,
    MERGE_SLOWDOWN,
    SLOWDOWN,
    STATISTICS_SECONDS,
    VIEW_SECONDS,
    Work,
    candidate_seconds,
    scoring_seconds,
    search_seconds,
    statistics_seconds,
)
from evomerge.plan.tokens import Batch, TaskLoad

MACHINE = Machine(prompt_flops=1e12, decode_flops=1e11, bytes_per_second=1e10, call_seconds=1e-5)
WORK = Work(parameters=1e8, layers=10, merged_bytes=8e8)


def load(*batches: Batch) -> TaskLoad:
    return TaskLoad(requests=1, prompt_tokens=1, new_tokens=Span(low=0, high=0), batches=batches)


def test_prompts_and_new_tokens_take_what_their_products_take() -> None:
    found = scoring_seconds(WORK, load(Batch(rows=4, length=50, new=Span(low=3, high=20))), MACHINE)
    calls = CALLS_PER_LAYER * 12 * 1e-5
    prompt = 2 * 1e8 * 4 * 50 / 1e12 + calls + CALLS_PER_REQUEST * 4 * 1e-5
    step = 2 * 1e8 * 4 / 1e11 + calls + CALLS_PER_TOKEN * 4 * 1e-5
    assert found.low == pytest.approx(SLOWDOWN.low * (prompt + 3 * step))
    assert found.high == pytest.approx(SLOWDOWN.high * (prompt + 20 * step))


def test_batches_add_up() -> None:
    one = Batch(rows=4, length=50, new=Span(low=0, high=0))
    assert scoring_seconds(WORK, load(one, one), MACHINE).low == pytest.approx(
        2 * scoring_seconds(WORK, load(one), MACHINE).low
    )


def test_a_merge_takes_its_bytes_and_a_path_hardly_anything() -> None:
    nothing = load()
    merged = candidate_seconds(WORK, nothing, MACHINE)
    assert merged == Span(low=0.08 * MERGE_SLOWDOWN.low, high=0.08 * MERGE_SLOWDOWN.high)
    path = Work(parameters=1e8, layers=10, merged_bytes=None)
    assert candidate_seconds(path, nothing, MACHINE) == VIEW_SECONDS


@pytest.mark.parametrize(
    ("evaluations", "population", "workers", "rounds"),
    [(12, 6, 1, 12), (12, 6, 2, 6), (12, 6, 4, 4), (14, 6, 4, 5), (16, 6, 3, 6), (3, 6, 2, 2), (12, 6, 8, 2)],
)
def test_workers_wait_at_the_end_of_a_generation(
    evaluations: int, population: int, workers: int, rounds: int
) -> None:
    found = search_seconds(
        Span(low=1, high=2), evaluations=evaluations, population=population, workers=workers
    )
    assert found == Span(low=rounds, high=2 * rounds)


def test_statistics_take_time_by_their_elements() -> None:
    asked = [Statistic(kind=kind, elements=1000, bytes=1) for kind in ("ranks", "gram")]
    expected = 1000 * (STATISTICS_SECONDS["ranks"] + STATISTICS_SECONDS["gram"])
    assert statistics_seconds(asked) == pytest.approx(expected)
