"""The measurement gives numbers one can divide by, and leaves torch as it was."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from evomerge.plan import machine
from evomerge.plan.machine import Load, measure

LOAD = Load(device="cpu", dtype="bfloat16", width=64, weight_bytes=100_000, rows=4, workers=3, threads=1)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROUND_SECONDS", 0.005)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_speed_is_a_positive_number(dtype: str) -> None:
    found = measure(dataclasses.replace(LOAD, dtype=dtype))
    for name, value in dataclasses.asdict(found).items():
        assert math.isfinite(value), name
        assert value > 0, name


def test_torch_keeps_its_threads() -> None:
    torch.set_num_threads(2)
    try:
        measure(LOAD)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_workers_beyond_the_cores_share_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine._Bench, "_rate", lambda self, _: 10.0 * self._lanes)
    few, many = (measure(dataclasses.replace(LOAD, workers=workers)) for workers in (2, 8))
    assert few.bytes_per_second == pytest.approx(4 * many.bytes_per_second)
    one = measure(dataclasses.replace(LOAD, workers=1))
    assert one.bytes_per_second == pytest.approx(few.bytes_per_second)
