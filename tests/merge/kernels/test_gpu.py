"""The kernels for GPUs give the results of the reference: in Triton's interpreter, and on a GPU if there is one.

Where there is none, they are still compiled for several, as the interpreter takes what the compiler refuses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.merge import execute
from evomerge.merge.bank import Bank
from evomerge.merge.kernels import gpu, reference
from evomerge.merge.methods import METHODS, BasePolicy, Scope
from evomerge.merge.methods.base import Axis, Combination, GramKind
from evomerge.merge.plan import TensorPlan
from tests.merge.kernels.gpu_cases import cases, elements, family, fault, ordered

ROOT = Path(__file__).parents[3]
NAMES = ("base", "one", "two")

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which is built for Linux only"
)
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Source:
    """A model of one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensor


def sources(*shape: int) -> dict[str, Source]:
    tensors = family(int(np.prod(shape)), [torch.bfloat16], len(NAMES), 1)
    return {name: Source(tensor.view(shape)) for name, tensor in zip(NAMES, tensors, strict=True)}


def faults(what: str, **environment: str) -> dict[str, str]:
    """Run the cases in a process of their own; those with a fault, and what it is."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.merge.kernels.gpu_cases", what],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found: dict[str, str] = json.loads(process.stdout)
    assert len(found) >= 60
    return {case: reason for case, reason in found.items() if reason}


@with_triton
def test_in_the_interpreter_every_bit_is_the_references() -> None:
    assert faults("interpret", TRITON_INTERPRET="1") == {}


@with_triton
def test_what_is_launched_compiles_for_gpus_without_contraction_or_inexact_division(tmp_path: Path) -> None:
    assert faults("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == {}


def test_types_without_a_kernel_are_left_to_the_reference() -> None:
    tensors = [torch.linspace(0, 1, 100, dtype=torch.float64), torch.ones(100)]
    out = torch.empty(100, dtype=torch.float64)
    assert gpu.run(Combination(coefficients=np.array([0.5, 0.25])), elements(tensors), out)
    torch.testing.assert_close(out, tensors[0] * 0.5 + 0.25, rtol=0, atol=1e-7)


class OnGpu:
    """A tensor on a GPU, for all that anyone asks."""

    device = torch.device("cuda")


def test_other_devices_are_left_to_the_reference_and_gpus_too_without_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert execute._kernel(torch.empty(1, device="meta")) is reference.run
    gpu.usable.cache_clear()
    monkeypatch.setitem(sys.modules, "evomerge.merge.kernels.gpu_loops", None)
    assert execute._kernel(OnGpu()) is reference.run  # type: ignore[arg-type]
    gpu.usable.cache_clear()


@with_triton
def test_where_triton_fails_the_reference_takes_over_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bool:
        raise RuntimeError("no C compiler")

    gpu.usable.cache_clear()
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    monkeypatch.setattr(gpu, "run", fails)
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert execute._kernel(OnGpu()) is reference.run  # type: ignore[arg-type]
    assert execute._kernel(OnGpu()) is reference.run  # type: ignore[arg-type]
    gpu.usable.cache_clear()


@with_triton
@pytest.mark.gpu
@with_gpu
def test_on_a_gpu_results_are_within_one_unit_in_the_last_place() -> None:
    assert gpu.usable()
    found = {name: fault(case, device="cuda", max_ulps=1) for name, case in cases().items()}
    assert {name: reason for name, reason in found.items() if reason} == {}


@pytest.mark.gpu
@with_gpu
@pytest.mark.parametrize("shape", [(7, 333), (5000,), (3, 4, 5), (9, 1)])
def test_statistics_on_a_gpu_are_those_on_the_cpu(shape: tuple[int, ...]) -> None:
    here, there = (Bank(sources(*shape), device=device) for device in ("cpu", "cuda"))
    one, base = ("one", "w"), ("base", "w")
    assert np.array_equal(there.histogram(one, base).table, here.histogram(one, base).table)
    assert torch.equal(there.ranks(one, base).cpu(), here.ranks(one, base))
    keys = [(name, "w") for name in NAMES]
    for kind in GramKind:
        for axis in Axis:
            found, expected = (bank.gram(keys, 0, kind, axis) for bank in (there, here))
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@with_gpu
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_on_a_gpu_what_it_gives_on_the_cpu(name: str) -> None:
    method = METHODS[name]
    models = NAMES[: method.max_models]
    given = {"weight": 0.7, "density": 0.4, "scale": 1.3}
    shared = {item.name: item.default for item in method.parameters if item.scope is Scope.RECIPE}
    plan = TensorPlan(
        name="w",
        shape=(40, 77),
        dtype="bfloat16",
        inputs=tuple((model, "w") for model in models),
        base=0 if method.base is BasePolicy.REQUIRED else None,
        method=method,
        shared={**shared, **({"t": 0.3} if method.parameter("t") else {})},
        values=tuple(given for _ in models),
        seed=3,
    )
    here, there = (
        execute.merge_tensor(plan, Bank(sources(40, 77), device=device)).cpu() for device in ("cpu", "cuda")
    )
    assert here.isfinite().all()
    assert (ordered(here) - ordered(there)).abs().max() <= 1
