"""Work is spread over as many threads as torch has, once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import evomerge
from evomerge.merge import execute
from evomerge.merge.kernels.threads import num_threads, spread, start
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
def test_work_that_was_started_goes_on_meanwhile() -> None:
    gate = threading.Event()
    first = start(lambda: gate.wait(10))
    second = start(lambda: gate.set() or num_threads())
    assert (first.result(), second.result()) == (True, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_what_was_started_comes_with_its_result(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    future = start(lambda: 1 // 0)
    torch.set_num_threads(before)
    with pytest.raises(ZeroDivisionError):
        future.result()


@pytest.mark.parametrize(("told", "expected"), [("3", 3), ("5,2", 5), ("", None), ("0", None), ("x", None)])
def test_without_torch_there_are_as_many_threads_as_it_would_have(told: str, expected: int | None) -> None:
    code = (
        "import sys; from evomerge.merge.kernels.threads import num_threads; "
        "print(num_threads(), 'torch' in sys.modules)"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": told,
        "PYTHONPATH": str(Path(evomerge.__file__).parents[1]),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected or len(os.sched_getaffinity(0))), "False"]


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
