"""Prepared without weights, a merge needs what it needs with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.bank import Bank
from evomerge.merge.execute import prepare_tensor
from evomerge.merge.memory import Memory
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import plan_merge
from evomerge.plan.header_bank import HeaderBank
from evomerge.recipe import Recipe


def recipe(method: str, zoo: Path) -> Recipe:
    spec = METHODS[method]
    count = max(spec.min_others, min(2, spec.max_others or 2))
    values = {"weight": 0.5, "density": 0.5, "t": 0.3, "epsilon": 0.1, "gamma": 0.05}
    own = {name: value for name, value in values.items() if spec.parameter(name) is not None}
    shared = {name: own.pop(name) for name in list(own) if spec.parameter(name).scope == "recipe"}
    others = [{"model": str(zoo / name), "parameters": own} for name in ("one", "two", "three")[:count]]
    head = {} if spec.base == "ignored" else {"base_model": str(zoo / "base")}
    return Recipe.from_dict(
        {"merge_method": method, "models": others, "parameters": shared, "dtype": "float32", **head}
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_needs_the_same_memory_and_the_same_statistics(
    method: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    wanted = recipe(method, tiny_zoo)
    sources = {name: Checkpoint.open(Path(name)) for name in wanted.model_names}
    plan = plan_merge(wanted, sources)
    memory = Memory.plan(plan.tensors, sources, None)
    headers, real = HeaderBank(sources), Bank(sources, statistics=tmp_path)
    for tensor in plan.tensors:
        planned, prepared = prepare_tensor(tensor, headers), prepare_tensor(tensor, real)
        assert planned.divisible == prepared.divisible
        assert planned.dtype == prepared.dtype
        assert memory.needed(tensor, planned, sources) == memory.needed(tensor, prepared, sources)
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == len(headers.asked)
    kept = sum(file.stat().st_size - 128 for file in files)
    asked = sum(statistic.bytes for statistic in headers.asked.values())
    if any(statistic.kind == "histogram" for statistic in headers.asked.values()):
        assert kept <= asked <= 100 * kept
    else:
        assert kept == asked


def test_values_are_never_read(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    wanted = recipe("della", tiny_zoo)
    sources = {name: Checkpoint.open(Path(name)) for name in wanted.model_names}
    bank = HeaderBank(sources)
    for tensor in plan_merge(wanted, sources).tensors:
        prepare_tensor(tensor, bank)
    assert bank.asked
