"""Work is spread over as many threads as torch has, once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from evomerge.merge import execute
from evomerge.merge.kernels.threads import num_threads, spread
from evomerge.merge.live import LiveModel
from evomerge.merge.plan import plan_merge
from tests.merge.zoo import merged, models, recipe


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_and_threads_do_not_spread_further() -> None:
    def work(item: int) -> tuple[int, int, str]:
        time.sleep(0.02 * (4 - item))
        return item, num_threads(), threading.current_thread().name

    results = spread(work, range(4))
    assert [item for item, _, _ in results] == [0, 1, 2, 3]
    assert {threads for _, threads, _ in results} == {1}
    assert len({name for _, _, name in results}) == 2
    assert num_threads() == 2
    assert spread(work, []) == []


@pytest.mark.usefixtures("two_threads")
def test_no_work_goes_on_after_an_error() -> None:
    finished = []

    def work(item: int) -> None:
        if item == 0:
            raise ValueError("no")
        time.sleep(0.05)
        finished.append(item)

    with pytest.raises(ValueError, match="no"):
        spread(work, range(4))
    assert sorted(finished) == [1, 2, 3]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("part", [1 << 22, 700, 100])
def test_a_live_model_is_the_same_by_several_threads_and_in_any_batches(
    part: int, tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "PART", part)
    wanted = recipe(
        "models: [{model: $one}, {model: $two}]\nmerge_method: ties\nbase_model: $base\n"
        "parameters: {weight: 0.7, density: 0.4}\n",
        tiny_zoo,
    )
    live = LiveModel(transformers.AutoModelForCausalLM.from_pretrained(tiny_zoo / "base").eval())
    live.poison()
    sources = models(wanted)
    live.write(plan_merge(wanted, sources), sources)
    expected = merged(wanted)
    assert all(torch.equal(live.targets[name], tensor) for name, tensor in expected.items())
