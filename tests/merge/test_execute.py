"""One tensor of a plan: in pieces or whole, by kernel or formula, merged or copied."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.errors import CheckpointError
from evomerge.merge import execute
from evomerge.merge.bank import Bank
from evomerge.merge.execute import compute, is_finite, merge_tensor, prepare_tensor, why_not_finite
from evomerge.merge.histogram import Histogram
from evomerge.merge.kernels import reference
from evomerge.merge.methods import METHODS, BasePolicy, MergeInputs, Scope
from evomerge.merge.plan import TensorPlan

DIVISIBLE = sorted(
    name
    for name, method in METHODS.items()
    if method.elementwise or method.combination is not None or method.task_vectors is not None
)
WHOLE = sorted(set(METHODS) - set(DIVISIBLE))
SHAPE = (37, 29)


class Source:
    """A model of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self, name: str) -> Tensor:
        assert name == "layer.weight"
        return self._tensor

    def content_hash(self) -> str:
        raise AssertionError("statistics are in memory")

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        raise AssertionError("there is no budget")


def given(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """A base, if the method has one, and models like it."""
    method = METHODS[name]
    count = (method.max_others or 2) + (method.base is not BasePolicy.IGNORED)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator)
    return [(base + 0.1 * i * torch.randn(shape, generator=generator)).to(dtype) for i in range(count)]


def plan_for(name: str, tensors: list[Tensor], *, dtype: str | None = "bfloat16", **other: Any) -> TensorPlan:
    method = METHODS[name]
    values: dict[str, Any] = {"weight": 0.7, "density": 0.4, "scale": 1.3, "gamma": 0.05, "epsilon": 0.2}
    shared = {item.name: item.default for item in method.parameters if item.scope is Scope.RECIPE}
    return TensorPlan(
        name="layer.weight",
        shape=tuple(tensors[0].shape),
        dtype=dtype,
        inputs=tuple((f"model {index}", "layer.weight") for index in range(len(tensors))),
        base=None if method.base is BasePolicy.IGNORED else 0,
        method=method,
        shared={**shared, **({"t": 0.3} if "t" in shared else {}), **other},
        values=tuple(values for _ in tensors),
        seed=3,
    )


def sources(tensors: list[Tensor]) -> dict[str, Source]:
    return {f"model {index}": Source(tensor) for index, tensor in enumerate(tensors)}


def test_the_methods_that_need_whole_tensors_are_few() -> None:
    assert {"arcee_fusion", "ramplus_tl", "sce"} == set(WHOLE)


@pytest.mark.parametrize("name", DIVISIBLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_runs_of_elements_give_the_bits_of_the_whole(name: str, dtype: str) -> None:
    tensors = given(name, *SHAPE)
    plan = plan_for(name, tensors, dtype=dtype)
    expected = merge_tensor(plan, sources(tensors)).view(-1)
    assert expected.isfinite().all()
    assert expected.float().std() > 0
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    assert prepared.divisible
    assert (prepared.numel, prepared.dtype) == (expected.numel(), expected.dtype)
    draw = random.Random(name)
    for num_cuts in (1, 3, 40):
        cuts = [0, *sorted(draw.sample(range(1, expected.numel()), num_cuts)), expected.numel()]
        found = torch.full_like(expected, torch.nan)
        runs = list(itertools.pairwise(cuts))
        draw.shuffle(runs)
        for start, end in runs:
            assert prepared.write(found[start:end], start)
        assert found.equal(expected)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("part", [1 << 22, 101])
def test_computing_does_what_merging_does(
    name: str, bad: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one run, or in several that begin at odd positions."""
    monkeypatch.setattr(execute, "PART", part)
    tensors = given(name, *SHAPE)
    if bad:
        tensors[-1].view(-1)[5] = math.nan
    plan = plan_for(name, tensors)
    expected = torch.full((tensors[0].numel(),), 7.0, dtype=torch.bfloat16)
    found = expected.clone()
    assert prepare_tensor(plan, Bank(sources(tensors))).write(expected) is not bad
    flawed = compute([(plan, found)], Bank(sources(tensors)))
    assert (flawed is not None) is bad
    if flawed is not None:
        assert flawed.plan is plan
        assert "layer.weight of model" in why_not_finite(flawed)
    assert found.view(torch.uint16).equal(expected.view(torch.uint16)) or bad


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_candidate_is_not_changed_by_those_before_it(name: str) -> None:
    """What is kept from one to the next is not used where it does not hold."""
    tensors = given(name, *SHAPE)
    plan = plan_for(name, tensors)
    bank, wide = Bank(sources(tensors)), torch.empty(tensors[0].numel())
    place = wide.view(torch.bfloat16)[: wide.numel()]
    elsewhere = torch.empty(2 * place.numel(), dtype=torch.bfloat16)
    smaller = tuple({**values, "weight": 0.3, "density": 1.0, "gamma": 0.2} for values in plan.values)
    first_only, last_only = (*plan.values[:2], *smaller[2:]), (*smaller[:-1], plan.values[-1])
    switches = {item for item, value in plan.shared.items() if isinstance(value, bool)}
    candidates: dict[str, tuple[dict[str, Any], Tensor]] = {
        "other parameters": ({"values": smaller}, place),
        "some other parameters": ({"values": first_only}, place),
        "others of them": ({"values": last_only}, place),
        **{
            f"another {item}": ({"shared": {**plan.shared, item: not plan.shared[item]}}, place)
            for item in sorted(switches)
        },
        "other shared ones": ({"shared": {**plan.shared, "t": 0.8, "lambda": 0.5, "normalize": True}}, place),
        "another seed": ({"seed": 4}, place),
        "another order": ({"inputs": plan.inputs[::-1]}, place),
        "another base": ({"base": None if plan.base is None else 1}, place),
        "elsewhere": ({}, elsewhere[: place.numel()]),
        "at an odd address": ({}, elsewhere[1 : place.numel() + 1]),
        "another type": ({"dtype": "float32"}, wide),
    }
    for what, (changes, out) in candidates.items():
        for _ in range(2):
            assert compute([(plan, place)], bank) is None
        changed = dataclasses.replace(plan, **changes)
        assert compute([(changed, out)], bank) is None
        assert out.equal(merge_tensor(changed, sources(tensors)).view(-1)), what


def test_of_a_tensor_that_only_parameters_change_everything_else_is_kept() -> None:
    tensors = given("ties", *SHAPE)
    plan, bank = plan_for("ties", tensors), Bank(sources(tensors))
    out = torch.empty(tensors[0].numel(), dtype=torch.bfloat16)
    moved = dataclasses.replace(plan, inputs=plan.inputs[::-1])
    frames = [bank.frame(other, out, part=100) for other in (plan, moved, plan, moved)]
    assert len(set(map(id, frames))) == 4
    kept = bank.frame(moved, out, part=100)
    assert kept not in frames
    assert bank.frame(dataclasses.replace(moved, values=()), out.view(-1), part=100) is kept
    assert bank.frame(dataclasses.replace(moved, seed=1), out, part=100) is not kept


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_only_without_a_budget_are_statistics_computed_for_several_tensors_at_once(
    budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    barrier = threading.Barrier(2)
    names = [f"layer.{number}" for number in range(4)]
    one = given("ties", *SHAPE)[0]

    class Names(Source):
        def tensor(self, name: str) -> Tensor:
            return self._tensor

        def release(self, name: str, first: int = 0, count: int | None = None) -> None:
            pass

    class Watched(Bank):
        def histogram(self, source: tuple[str, str], base: tuple[str, str]) -> Histogram:
            if source[1] != names[0]:
                threads.add(threading.get_ident())
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait(timeout=1)
            return super().histogram(source, base)

    monkeypatch.setattr(execute, "PART", 100)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    tensors = given("ties", *SHAPE)
    plan = plan_for("ties", tensors)
    bank = Watched({f"model {index}": Names(tensor) for index, tensor in enumerate(tensors)}, budget=budget)
    wanted = [
        (
            dataclasses.replace(plan, name=name, inputs=tuple((model, name) for model, _ in plan.inputs)),
            torch.empty(one.numel(), dtype=torch.bfloat16),
        )
        for name in names
    ]
    assert compute(wanted, bank) is None
    assert len(threads) == (2 if budget is None else 1)


@pytest.mark.parametrize("name", WHOLE)
def test_others_are_computed_whole(name: str) -> None:
    tensors = given(name, *SHAPE)
    plan = plan_for(name, tensors)
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    assert not prepared.divisible
    found = torch.empty(prepared.numel, dtype=torch.bfloat16)
    assert prepared.write(found)
    assert found.equal(merge_tensor(plan, sources(tensors)).view(-1))
    with pytest.raises(AssertionError, match="whole"):
        prepared.write(found[:10])
    with pytest.raises(AssertionError, match="whole"):
        prepared.write(found[10:], 10)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("piece", [1 << 16, 1000, 77])
def test_the_size_of_the_pieces_changes_no_bit(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = given(name, *SHAPE)
    expected = merge_tensor(plan_for(name, tensors), sources(tensors))
    monkeypatch.setattr(execute, "PIECE", piece)
    monkeypatch.setattr(reference, "PIECE", piece)
    monkeypatch.setattr("evomerge.merge.kernels.cpu_arrays.PIECE", piece)
    assert merge_tensor(plan_for(name, tensors), sources(tensors)).equal(expected)


def test_formulas_are_told_where_a_piece_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def positions(inputs: MergeInputs) -> Tensor:
        return torch.arange(inputs.first, inputs.first + inputs.tensors[0].numel()).float()

    probe = dataclasses.replace(METHODS["nearswap"], formula=positions)
    tensors = given("nearswap", 100)
    plan = dataclasses.replace(plan_for("nearswap", tensors, dtype="float32"), method=probe)
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    monkeypatch.setattr(execute, "PIECE", 7)
    out = torch.empty(60)
    assert prepared.write(out, 30)
    assert out.tolist() == [*range(30, 90)]


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 5), (7,), (1,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_the_formula_says(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The formula is the oracle; operations may round sums in another order."""
    tensors = given(name, *shape, dtype=dtype)
    plan = plan_for(name, tensors, dtype="float32")
    inputs = MergeInputs(
        name=plan.name,
        tensors=[tensor.float() for tensor in tensors],
        base=plan.base,
        shared=plan.shared,
        values=plan.values,
        seed=plan.seed,
    )
    merged = merge_tensor(plan, sources(tensors))
    assert merged.shape == shape
    torch.testing.assert_close(merged, plan.method.formula(inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["linear", "ties", "nearswap", "sce", "dare_ties"])
def test_results_are_rounded_once_to_the_plans_type(name: str, dtype: str) -> None:
    tensors = given(name, *SHAPE)
    exact = merge_tensor(plan_for(name, tensors, dtype="float32"), sources(tensors))
    found = merge_tensor(plan_for(name, tensors, dtype=dtype), sources(tensors))
    assert found.dtype == getattr(torch, dtype)
    assert found.equal(exact.to(found.dtype))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_nothing_of_nothing(name: str, shape: tuple[int, ...]) -> None:
    tensors = given(name, *shape)
    prepared = prepare_tensor(plan_for(name, tensors), Bank(sources(tensors)))
    assert prepared.write(torch.empty(0, dtype=torch.bfloat16))
    assert merge_tensor(plan_for(name, tensors), sources(tensors)).shape == shape


@pytest.mark.parametrize("name", sorted(METHODS))
def test_sources_stay_as_they_are(name: str) -> None:
    tensors = given(name, *SHAPE, dtype=torch.float32)
    before = [tensor.clone() for tensor in tensors]
    merged = merge_tensor(plan_for(name, tensors, dtype="float32"), sources(tensors))
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor.equal(copy)
        assert tensor.data_ptr() != merged.data_ptr()


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "nearswap", "sce"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_reported_with_its_source(name: str, bad: float) -> None:
    tensors = given(name, *SHAPE)
    out = torch.empty(math.prod(SHAPE), dtype=torch.bfloat16)
    assert prepare_tensor(plan_for(name, tensors), Bank(sources(tensors))).write(out)
    tensors[1][36, 28] = bad
    prepared = prepare_tensor(plan_for(name, tensors), Bank(sources(tensors)))
    assert not prepared.write(out)
    assert "as layer.weight of model 1 does" in why_not_finite(prepared)


def test_a_merge_that_overflows_is_reported_as_such() -> None:
    tensors = [torch.full((3,), 60000.0), torch.full((3,), 60000.0)]
    plan = plan_for("linear", tensors, dtype="float16", normalize=False)
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    assert not prepared.write(torch.empty(3, dtype=torch.float16))
    assert "the merge overflowed float16" in why_not_finite(prepared)


def test_weights_that_sum_to_0_are_reported_as_such() -> None:
    tensors = given("linear", 3)
    plan = plan_for("linear", tensors)
    values = tuple({"weight": (-1.0) ** index} for index in range(len(tensors)))
    prepared = prepare_tensor(dataclasses.replace(plan, values=values), Bank(sources(tensors)))
    assert not prepared.write(torch.empty(3, dtype=torch.bfloat16))
    assert "the sum of the weights 1, -1, which is 0" in why_not_finite(prepared)


def test_the_workspace_bounds_what_formulas_take() -> None:
    big = [torch.empty(1 << 18, dtype=torch.bfloat16)] * 3
    pieces = prepare_tensor(plan_for("linear", big), Bank(sources(big))).workspace_bytes
    whole = prepare_tensor(plan_for("sce", big), Bank(sources(big))).workspace_bytes
    assert whole == 4 * pieces
    assert prepare_tensor(plan_for("linear", big, dtype=None), Bank(sources(big))).workspace_bytes == 0


# Tensors that are scaled after they are merged.


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize(("factor", "offset"), [(-1.7, 0.0), (0.3, 1.0), (0.0, 1.0)])
def test_any_merged_tensor_can_be_scaled_before_it_is_rounded(
    name: str, factor: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "PIECE", 100)
    tensors = given(name, *SHAPE)
    merged = merge_tensor(plan_for(name, tensors, dtype="float32"), sources(tensors)).double()
    expected = factor * (offset + merged) - offset
    exact = dataclasses.replace(plan_for(name, tensors, dtype="float32"), rescale=(factor, offset))
    found = merge_tensor(exact, sources(tensors))
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=2e-7)
    rounded = dataclasses.replace(exact, dtype="bfloat16")
    assert merge_tensor(rounded, sources(tensors)).equal(found.bfloat16())


def test_any_run_of_a_scaled_tensor_has_the_bits_of_the_whole() -> None:
    tensors = given("ties", *SHAPE)
    plan = dataclasses.replace(plan_for("ties", tensors), rescale=(0.7, 1.0))
    expected = merge_tensor(plan, sources(tensors)).view(-1)
    found = torch.empty_like(expected)
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    for start, end in itertools.pairwise((0, 5, 700, expected.numel())):
        assert prepared.write(found[start:end], start)
    assert found.equal(expected)


def test_a_small_weight_keeps_its_places_beside_the_offset() -> None:
    tensors = [torch.tensor([1e-6, -3e-9, 0.25])]
    plan = dataclasses.replace(plan_for("passthrough", tensors, dtype="float32"), rescale=(1.0, 1.0))
    plan = dataclasses.replace(plan, values=({"scale": None},))
    assert merge_tensor(plan, sources(tensors)).equal(tensors[0])


def test_a_scale_that_overflows_is_reported() -> None:
    tensors = given("linear", *SHAPE)
    plan = dataclasses.replace(plan_for("linear", tensors, dtype="float16"), rescale=(1e6, 0.0))
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    assert not prepared.write(torch.empty(prepared.numel, dtype=torch.float16))
    assert "the merge overflowed float16" in why_not_finite(prepared)
    plain = prepare_tensor(dataclasses.replace(plan, rescale=None), Bank(sources(tensors)))
    assert prepared.workspace_bytes == plain.workspace_bytes + 4 * prepared.numel


# Tensors that are copied.

COPIED = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def copies(dtype: torch.dtype, count: int = 2) -> list[Tensor]:
    return [torch.arange(24).remainder(2).to(dtype).view(4, 6) for _ in range(count)]


@pytest.mark.parametrize("dtype", COPIED)
@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "passthrough"])
def test_equal_tensors_are_copied(name: str, dtype: torch.dtype) -> None:
    tensors = copies(dtype, 1 if name == "passthrough" else 2)
    plan = plan_for(name, tensors, dtype=None)
    merged = merge_tensor(plan, sources(tensors))
    assert (merged.dtype, merged.shape) == (dtype, (4, 6))
    assert merged.view(torch.uint8).equal(tensors[0].view(torch.uint8))
    prepared = prepare_tensor(plan, Bank(sources(tensors)))
    assert prepared.divisible
    assert prepared.dtype == dtype
    part = torch.empty(7, dtype=dtype)
    assert prepared.write(part, 5)
    assert part.view(torch.uint8).equal(tensors[0].view(-1)[5:12].view(torch.uint8))


@pytest.mark.parametrize("dtype", COPIED)
def test_tensors_that_differ_cannot_be_copied(dtype: torch.dtype) -> None:
    tensors = copies(dtype, 3)
    tensors[2].view(torch.uint8)[1, 2] ^= 1
    with pytest.raises(
        CheckpointError, match=re.escape(f"layer.weight is of type {dtype} and differs")
    ) as caught:
        merge_tensor(plan_for("linear", tensors, dtype=None), sources(tensors))
    assert "model 2" in str(caught.value)


def test_tensors_of_two_types_cannot_be_copied_though_they_are_equal() -> None:
    tensors = [torch.ones(3, dtype=torch.uint8), torch.ones(3, dtype=torch.bool)]
    with pytest.raises(CheckpointError, match=r"torch\.bool"):
        merge_tensor(plan_for("linear", tensors, dtype=None), sources(tensors))


def test_copies_are_compared_by_bits() -> None:
    """A NaN is equal to itself, 0 is not -0."""
    one = torch.tensor([math.nan, 0.0]).to(torch.float8_e4m3fn)
    same, other = one.clone(), torch.tensor([math.nan, -0.0]).to(torch.float8_e4m3fn)
    plan = plan_for("linear", [one, same], dtype=None)
    assert merge_tensor(plan, sources([one, same])).view(torch.uint8).equal(one.view(torch.uint8))
    with pytest.raises(CheckpointError):
        merge_tensor(plan, sources([one, other]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.zeros(0, dtype=dtype))
    assert is_finite(torch.tensor([0.0, -1.0, torch.finfo(dtype).max], dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite(torch.tensor([0.0, bad], dtype=dtype))


@pytest.mark.parametrize("dtype", COPIED)
def test_types_without_arithmetic_count_as_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3).to(dtype))
