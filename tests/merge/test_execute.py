"""Pieces of a tensor merge to the same bits as the whole tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomerge.merge import execute
from evomerge.merge.methods import METHODS, Scope
from evomerge.merge.plan import TensorPlan

COUNT = 2 * execute.PIECE + 12_345
ELEMENTWISE = sorted(name for name, method in METHODS.items() if method.elementwise)


class Source:
    """A model of one tensor."""

    def __init__(self, seed: int) -> None:
        self._tensor = torch.randn(5, COUNT // 5, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensor


def plan_for(name: str) -> TensorPlan:
    method = METHODS[name]
    models = ("base",) if method.max_models == 1 else ("base", "one", "two")
    base = 0 if method.parameter("lambda") else None
    given: dict[str, Any] = {"weight": 0.7, "density": 0.4, "scale": 1.3}
    return TensorPlan(
        name="layer.weight",
        shape=(5, COUNT // 5),
        dtype="bfloat16",
        inputs=tuple((model, "layer.weight") for model in models),
        base=base,
        method=method,
        shared={item.name: item.default for item in method.parameters if item.scope is Scope.RECIPE},
        values=tuple(given for _ in models),
        seed=3,
    )


def test_methods_that_look_at_whole_tensors_are_not_cut() -> None:
    assert {"linear", "task_arithmetic", "dare_linear", "dare_ties", "passthrough"} == set(ELEMENTWISE)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("piece", [COUNT, 4096, 777])
def test_the_size_of_the_pieces_changes_no_bit(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {model: Source(seed) for seed, model in enumerate(("base", "one", "two"))}
    expected = execute.merge_tensor(plan_for(name), sources)
    monkeypatch.setattr(execute, "PIECE", piece)
    assert execute.merge_tensor(plan_for(name), sources).equal(expected)
    assert expected.isfinite().all()
    assert expected.float().std() > 0
