"""The compiled loops give the reference's bits, whatever the types, sizes, chunks and threads."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.merge.bank import Bank
from evomerge.merge.counter_hash import hash_element, keys, tie_number
from evomerge.merge.execute import prepare_tensor
from evomerge.merge.histogram import LAST_KEY, TIES, Band, Histogram
from evomerge.merge.kernels import cpu, reference
from evomerge.merge.methods import METHODS, Axis, BasePolicy, Combination, GramKind, MergeInputs, Scope
from evomerge.merge.methods.combination import gram_matrices
from evomerge.merge.methods.task_vectors import Random, Ranked, TaskVectorSum, Term
from evomerge.merge.plan import TensorPlan

from .operations import (
    BF16,
    F16,
    F32,
    F64,
    assert_agrees,
    bits,
    combination,
    elements,
    task_vector_sum,
    tensors,
)

KINDS = ["all", "random", "largest", "band", "ranked"]
SUMS = {"add": (False, True), "elect": (True, False), "elect and divide": (True, True)}
SIZES = [1, 2, 3, 8, 31, 1001]
BIG = 2 * cpu.PIECE + 1234


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Every pair of types and number of sources is compiled anew, half a second each: these lists grow the wait.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SUMS)
def test_sums_of_task_vectors_of_bfloat16(kind: str, how: str) -> None:
    elect, normalize = SUMS[how]
    for number, (count, whole) in enumerate(itertools.product(SIZES, [None, 2])):
        draw = random.Random(number)
        inputs = tensors(count, BF16, BF16, BF16, seed=number)
        stated = task_vector_sum(kind, inputs, elect=elect, normalize=normalize, draw=draw, whole=whole)
        assert_agrees(cpu.run, stated, elements(inputs, stated=stated), BF16)


@pytest.mark.parametrize(
    ("kind", "how", "stored", "out"),
    [
        ("band", "elect and divide", F32, F32),
        ("ranked", "add", F32, F32),
        ("random", "elect", F32, BF16),
        ("largest", "elect and divide", F32, BF16),
        ("ranked", "elect and divide", BF16, F32),
        ("band", "add", BF16, F32),
        # By way of float32.
        ("band", "elect and divide", F16, F16),
        ("ranked", "add", F16, F32),
        ("ranked", "add", BF16, F16),
        # In torch.
        ("largest", "elect", F64, F32),
        ("ranked", "elect", F32, F64),
        ("random", "add", F64, F64),
    ],
)
def test_sums_of_task_vectors_of_other_types(
    kind: str, how: str, stored: torch.dtype, out: torch.dtype
) -> None:
    elect, normalize = SUMS[how]
    for number, count in enumerate(SIZES):
        inputs = tensors(count, stored, stored, stored, seed=number)
        draw = random.Random(number)
        stated = task_vector_sum(kind, inputs, elect=elect, normalize=normalize, draw=draw)
        assert_agrees(cpu.run, stated, elements(inputs, stated=stated), out)


@pytest.mark.parametrize("types", [(BF16, F32, F16), (F16, BF16, BF16), (F32, F64, BF16)])
@pytest.mark.parametrize("out", [BF16, F16, F32])
def test_sums_of_task_vectors_of_mixed_types(types: tuple[torch.dtype, ...], out: torch.dtype) -> None:
    inputs = tensors(1001, *types)
    for kind, how in (("band", "elect and divide"), ("ranked", "add")):
        elect, normalize = SUMS[how]
        stated = task_vector_sum(kind, inputs, elect=elect, normalize=normalize, draw=random.Random(0))
        assert_agrees(cpu.run, stated, elements(inputs, stated=stated), out)


@pytest.mark.parametrize(
    ("kind", "how", "number"),
    [
        ("largest", "elect and divide", 1),
        ("largest", "elect and divide", 3),
        ("random", "add", 3),
        ("band", "elect", 4),
        ("ranked", "elect and divide", 5),
        ("all", "add", 1),
        ("all", "add", 5),
    ],
)
@pytest.mark.parametrize("base", ["first", "last"])
def test_any_number_of_sources_and_place_of_the_base(kind: str, how: str, number: int, base: str) -> None:
    elect, normalize = SUMS[how]
    origin = 0 if base == "first" else number
    for count in (1, 777):
        inputs = tensors(count, *[BF16] * (number + 1), seed=number)
        stated = task_vector_sum(
            kind, inputs, base=origin, elect=elect, normalize=normalize, draw=random.Random(count)
        )
        assert_agrees(cpu.run, stated, elements(inputs, base=origin, stated=stated), BF16)


@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("dtype", [BF16, F32, F16])
def test_the_base_alone_comes_back(how: str, scale: float, dtype: torch.dtype) -> None:
    elect, normalize = SUMS[how]
    stated = TaskVectorSum(terms=(), elect=elect, normalize=normalize, scale=scale)
    inputs = tensors(101, dtype)
    assert assert_agrees(cpu.run, stated, elements(inputs), dtype).equal(inputs[0])


@pytest.mark.parametrize(
    "weights", [(1.0, -1.0), (0.0, 0.0), (1e-9, -2e-9), (1e-7, 0.0), (0.1, 0.2), (3, -4)]
)
@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 1e30])
def test_weights_that_cancel_or_vanish(weights: tuple[float, float], how: str, scale: float) -> None:
    elect, normalize = SUMS[how]
    inputs = tensors(333, BF16, BF16, BF16)
    for rescale in (1.0, 1 / 3):
        terms = tuple(
            Term(source=source, weight=weight, rescale=rescale)
            for source, weight in enumerate(weights, start=1)
        )
        stated = TaskVectorSum(terms=terms, elect=elect, normalize=normalize, scale=scale)
        assert_agrees(cpu.run, stated, elements(inputs), BF16)


@pytest.mark.parametrize("how", SUMS)
def test_densities_that_keep_next_to_nothing(how: str) -> None:
    """Densities whose share of the hash rounds to one value, or to none."""
    elect, normalize = SUMS[how]
    inputs = tensors(501, BF16, BF16, BF16)
    for last in (-1, 0, 1, 2**31, 2**32 - 2, 2**32 - 1):
        terms = (
            Term(source=1, weight=1.0, keep=Random(last=last), rescale=0.0 if last < 0 else 2.0),
            Term(source=2, weight=0.5, keep=Random.share(0.5)),
        )
        stated = TaskVectorSum(terms=terms, elect=elect, normalize=normalize, scale=1.0)
        assert_agrees(cpu.run, stated, elements(inputs), BF16)


@pytest.mark.parametrize("how", SUMS)
def test_bands_with_and_without_an_upper_end_together(how: str) -> None:
    elect, normalize = SUMS[how]
    inputs = tensors(501, BF16, BF16, BF16)
    histograms = [Histogram.of(tensor.float() - inputs[0].float()) for tensor in inputs[1:]]
    open_band, closed = histograms[0].largest(200), histograms[1].band(100, 300)
    assert open_band.highest == LAST_KEY > closed.highest
    terms = (Term(source=1, weight=1.0, keep=open_band), Term(source=2, weight=0.5, keep=closed))
    for order in (terms, terms[::-1]):
        stated = TaskVectorSum(terms=order, elect=elect, normalize=normalize, scale=1.0)
        assert_agrees(cpu.run, stated, elements(inputs), BF16)


def test_the_hash_value_at_the_bound_itself() -> None:
    """Bounds that are the hash or the key of an element of the run."""
    inputs = [torch.zeros(9), torch.ones(9), torch.ones(9)]
    ones = (0x3F800000 >> 14) * TIES
    for e, dtype in itertools.product(range(9), [F32, BF16]):
        both_keys = keys(3, "layers.0.w", 1)
        h, key = hash_element(e, *both_keys), ones + tie_number(e, *both_keys)
        chance = (h >> 8) / 2**24
        for keep, expected in (
            (Random(last=h), 1.0),
            (Random(last=h - 1), 0.0),
            (Band(key), 1.0),
            (Band(key + 1), 0.0),
            (Band(key, key), 1.0),
            (Band(key - 1, key - 1), 0.0),
            (Band(0, key), 1.0),
            (Band(0, key - 1), 0.0),
            (Ranked(lowest=chance, highest=chance, rescale=False), 0.0),
            (Ranked(lowest=chance + 2.0**-24, highest=chance + 2.0**-24, rescale=False), 1.0),
        ):
            terms = (Term(source=1, weight=1.0, keep=keep), Term(source=2, weight=0.0, keep=keep))
            stated = TaskVectorSum(terms=terms, elect=True, normalize=True, scale=1.0)
            given = elements([tensor.to(dtype) for tensor in inputs], stated=stated)
            assert assert_agrees(cpu.run, stated, given, dtype)[e] == expected


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bands_at_the_ends_of_all_magnitudes(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1e-45 if dtype is F32 else 1e-40, 1.0, 3.3e38])
    inputs = [tensor.to(dtype) for tensor in (torch.zeros(4), values, torch.zeros(4))]
    for keep in (Band(0), Band(LAST_KEY), Band(0, 0), Band(0, LAST_KEY - 1)):
        terms = (Term(source=1, weight=1.0, keep=keep), Term(source=2, weight=1.0, keep=keep))
        stated = TaskVectorSum(terms=terms, elect=True, normalize=True, scale=1.0)
        found = assert_agrees(cpu.run, stated, elements(inputs), dtype)
        everything = keep.lowest == 0 and keep.highest >= LAST_KEY - 1
        assert bool((found == (inputs[1] if everything else 0)).all())


# Combinations.


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_combinations_of_any_number_of_tensors(number: int) -> None:
    for count, divisor in itertools.product(SIZES, [1.0, -0.3]):
        inputs = tensors(count, *[BF16] * number)
        stated = combination(number, shape=(count,), divisor=divisor)
        assert_agrees(cpu.run, stated, elements(inputs, base=None), BF16)


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("around", [None, 0, 2])
@pytest.mark.parametrize(
    ("stored", "out"), [(BF16, BF16), (F32, F32), (F32, BF16), (BF16, F32), (F16, F16), (F64, F32)]
)
def test_combinations_along_every_axis(
    axis: Axis, around: int | None, stored: torch.dtype, out: torch.dtype
) -> None:
    for shape, divisor in itertools.product([(), (7,), (5, 9), (3, 4, 5), (1, 8), (8, 1)], [1.0, 2.6]):
        inputs = tensors(math.prod(shape), stored, stored, stored)
        stated = combination(3, shape=shape, axis=axis, around=around, divisor=divisor)
        assert_agrees(cpu.run, stated, elements(inputs, base=around, shape=shape), out)


@pytest.mark.parametrize("axis", [Axis.ROWS, Axis.COLUMNS])
@pytest.mark.parametrize("around", [None, 0])
def test_coefficients_belong_to_positions_in_the_whole_tensor(axis: Axis, around: int | None) -> None:
    shape = (6, 7)
    inputs = tensors(42, BF16, BF16, BF16)
    stated = combination(3, shape=shape, axis=axis, around=around)
    whole = elements(inputs, base=around, shape=shape)
    expected = assert_agrees(cpu.run, stated, whole, BF16)
    for start, end in itertools.combinations(range(0, 43, 5), 2):
        part = torch.empty(end - start, dtype=BF16)
        assert cpu.run(stated, whole.part(start, end), part)
        assert part.equal(expected[start:end])


# Positions and chunks.

CHUNKED = [("random", "elect and divide"), ("band", "elect and divide"), ("ranked", "add"), ("all", "add")]


@pytest.mark.parametrize(("kind", "how"), CHUNKED)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_threads_and_pieces_change_no_bit(kind: str, how: str, dtype: torch.dtype, threads: int) -> None:
    elect, normalize = SUMS[how]
    inputs = tensors(BIG, dtype, dtype, dtype)
    stated = task_vector_sum(kind, inputs, elect=elect, normalize=normalize, draw=random.Random(5))
    assert_agrees(cpu.run, stated, elements(inputs, stated=stated), dtype)


@pytest.mark.parametrize(("kind", "how"), CHUNKED)
def test_runs_of_any_length_give_the_bits_of_the_whole(kind: str, how: str) -> None:
    elect, normalize = SUMS[how]
    inputs = tensors(1003, BF16, BF16, BF16)
    stated = task_vector_sum(kind, inputs, elect=elect, normalize=normalize, draw=random.Random(5))
    whole = elements(inputs, stated=stated)
    expected = assert_agrees(cpu.run, stated, whole, BF16)
    found = torch.empty_like(expected)
    draw = random.Random(0)
    cuts = [0, *sorted(draw.sample(range(1, 1003), 40)), 1003]
    for start, end in itertools.pairwise(cuts):
        cpu.run(stated, whole.part(start, end), found[start:end])
    assert bits(found).equal(bits(expected))


FIRSTS = [1, 2**31 - 50, 2**32 - 50, 2**32 - 1, 2**32, 2**32 + 7, 3 * 2**32 - 100, 2**40 + 2**32 - 3]


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("kind", ["random", "band", "ranked"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_positions_are_counted_in_64_bits(first: int, kind: str, dtype: torch.dtype) -> None:
    inputs = tensors(203, dtype, dtype, dtype)
    stated = task_vector_sum(kind, inputs, elect=True, normalize=True, draw=random.Random(1))
    assert_agrees(cpu.run, stated, elements(inputs, first=first, stated=stated), dtype)


def test_a_long_run_crosses_2_to_the_32_in_any_piece(threads: int) -> None:
    inputs = tensors(BIG, BF16, BF16, BF16)
    stated = task_vector_sum("random", inputs, elect=True, normalize=True, draw=random.Random(1))
    assert_agrees(cpu.run, stated, elements(inputs, first=2**32 - cpu.PIECE - 77), BF16)


def test_what_is_kept_is_what_the_hash_says() -> None:
    """Not by the reference, but by the definition of the hash, element by element."""
    first, count, share = 2**32 - 20, 40, 0.37
    inputs = [torch.zeros(count, dtype=BF16), torch.ones(count, dtype=BF16), torch.ones(count, dtype=BF16)]
    terms = tuple(Term(source=source, weight=float(source), keep=Random.share(share)) for source in (1, 2))
    stated = TaskVectorSum(terms=terms, elect=True, normalize=False, scale=1.0)
    found = torch.empty(count, dtype=BF16)
    assert cpu.run(stated, elements(inputs, first=first, seed=9), found)
    expected = [
        sum(
            source * (hash_element(e, *keys(9, "layers.0.w", source)) < round(share * 2**32))
            for source in (1, 2)
        )
        for e in range(first, first + count)
    ]
    assert found.tolist() == expected
    assert set(expected) == {0, 1, 2, 3}


@pytest.mark.parametrize("axis", [Axis.ROWS, Axis.COLUMNS])
def test_rows_and_columns_of_tensors_of_more_than_2_to_the_32_elements(axis: Axis) -> None:
    """A tensor of few, very long rows, of which a run around position 2^32 is computed."""
    shape = (3, 2**31 + 5) if axis is Axis.ROWS else (2**31, 3)
    inputs = tensors(64, BF16, BF16, BF16)
    stated = combination(3, shape=(3, 3), axis=axis)
    for first in (0, 2**31 - 20, 2**32 - 32, 2**32 + 9):
        given = elements(inputs, base=None, shape=shape, first=first)
        assert_agrees(cpu.run, stated, given, BF16)


# Sizes and memory.


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_of_nothing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = tensors(0, dtype, dtype, dtype)
    keep = Ranked(lowest=0.1, highest=0.2, rescale=True)
    terms = tuple(Term(source=source, weight=1.0, keep=keep) for source in (1, 2))
    stated = TaskVectorSum(terms=terms, elect=True, normalize=True, scale=1.0)
    for first in (0, 1):
        assert_agrees(cpu.run, stated, elements(inputs, shape=shape, first=first, stated=stated), dtype)
    for axis in Axis:
        given = elements(inputs, base=None, shape=shape)
        assert_agrees(cpu.run, combination(3, shape=shape, axis=axis), given, dtype)


def test_only_the_run_itself_is_written() -> None:
    inputs = tensors(100, BF16, BF16, BF16)
    stated = task_vector_sum("random", inputs, elect=True, normalize=True, draw=random.Random(1))
    out = torch.full((120,), 7.0, dtype=BF16)
    assert cpu.run(stated, elements(inputs), out[10:110])
    assert out[:10].eq(7).all()
    assert out[110:].eq(7).all()


@pytest.mark.parametrize("kind", ["random", "band"])
def test_pairs_may_lie_anywhere_in_memory(kind: str) -> None:
    """In a file, a tensor begins wherever the one before it ends: 2 bytes from a multiple of 4 as well."""
    inputs = tensors(101, BF16, BF16, BF16)
    stated = task_vector_sum(kind, inputs, elect=True, normalize=True, draw=random.Random(1))
    expected = assert_agrees(cpu.run, stated, elements(inputs), BF16)
    moved = [torch.cat([torch.zeros(1, dtype=BF16), tensor])[1:] for tensor in inputs]
    out = torch.full((104,), 7.0, dtype=BF16)
    assert cpu.run(stated, elements(moved), out[1:102])
    assert bits(out[1:102]).equal(bits(expected))
    assert out[[0, 102, 103]].eq(7).all()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_inputs_may_have_gaps(dtype: torch.dtype) -> None:
    inputs = tensors(101, dtype, dtype, dtype)
    stated = task_vector_sum("band", inputs, elect=True, normalize=True, draw=random.Random(1))
    spread = [torch.stack([tensor, tensor + 1], dim=1)[:, 0] for tensor in inputs]
    for given in ([*inputs[:2], spread[2]], spread):
        found = assert_agrees(cpu.run, stated, elements(given), dtype)
        assert found.equal(assert_agrees(cpu.run, stated, elements(inputs), dtype))


def test_an_output_with_gaps_is_written_in_place() -> None:
    """As a column of a live parameter is."""
    inputs = tensors(100, BF16, BF16, BF16)
    stated = task_vector_sum("random", inputs, elect=True, normalize=True, draw=random.Random(1))
    expected = assert_agrees(cpu.run, stated, elements(inputs), BF16)
    out = torch.full((100, 3), 7.0, dtype=BF16)
    assert cpu.run(stated, elements(inputs), out[:, 1])
    assert out[:, 1].equal(expected)
    assert out[:, ::2].eq(7).all()


# What is not finite.

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize(("stored", "out"), [(BF16, BF16), (F16, F16), (F16, BF16), (F64, F64)])
def test_the_verdict_on_what_is_not_finite_is_the_references(
    bad: float, who: int, how: str, stored: torch.dtype, out: torch.dtype
) -> None:
    elect, normalize = SUMS[how]
    for place in (0, 50, 100):
        inputs = tensors(101, stored, stored, stored)
        inputs[who][place] = bad
        for kind in ("all", "largest"):
            if stored == F16 and kind == "largest" and how != "elect and divide":
                continue
            stated = task_vector_sum(kind, inputs, elect=elect, normalize=normalize, draw=random.Random(7))
            assert_agrees(cpu.run, stated, elements(inputs), out)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("place", [0, cpu.PIECE - 1, cpu.PIECE, BIG - 1])
def test_one_element_that_is_not_finite_is_seen_in_any_piece(
    bad: float, dtype: torch.dtype, place: int, threads: int
) -> None:
    inputs = tensors(BIG, dtype, dtype)
    stated = Combination(coefficients=np.array([0.5, 0.5]))
    out = torch.empty(BIG, dtype=dtype)
    assert cpu.run(stated, elements(inputs, base=None), out)
    inputs[1][place] = bad
    assert not cpu.run(stated, elements(inputs, base=None), out)


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("around", [None, 0])
def test_every_loop_sees_what_is_not_finite(axis: Axis, around: int | None) -> None:
    for bad, place in itertools.product(BAD, (0, 17, 34)):
        inputs = tensors(35, BF16, BF16, BF16)
        inputs[1][place] = bad
        stated = combination(3, shape=(5, 7), axis=axis, around=around)
        given = elements(inputs, base=around, shape=(5, 7))
        assert not assert_agrees(cpu.run, stated, given, BF16).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        (BF16, 3.3895313892515355e38, 3.3961775292304557e38),
        (F16, 65504.0, 65520.0),
        (F32, 3.4028234663852886e38, math.inf),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflow_of_the_rounded_result_is_seen(
    dtype: torch.dtype, largest: float, beyond: float, sign: float
) -> None:
    """`beyond` is the smallest number that rounds to infinity."""
    stated = Combination(coefficients=np.ones(1))
    below = float(np.nextafter(np.float32(beyond), np.float32(0)))
    for value, finite in ((largest, True), (below, True), (beyond, False)):
        out = torch.empty(3, dtype=dtype)
        given = elements([torch.tensor([1.0, sign * value, 2.0])], base=None)
        assert cpu.run(stated, given, out) is finite
        assert reference.run(stated, given, out.clone()) is finite
        assert out.isfinite().tolist() == [True, finite, True]


def test_overflow_within_a_sum_is_seen() -> None:
    inputs = [torch.tensor([0.0, 0.0]), torch.tensor([3e38, 1.0]), torch.tensor([3e38, 1.0])]
    for elect, normalize in SUMS.values():
        terms = tuple(Term(source=source, weight=1.0) for source in (1, 2))
        stated = TaskVectorSum(terms=terms, elect=elect, normalize=normalize, scale=0.5)
        out = torch.empty(2)
        assert not cpu.run(stated, elements(inputs), out)


@pytest.mark.parametrize("stored", [BF16, F32])
def test_results_are_rounded_to_the_nearest_even(stored: torch.dtype) -> None:
    """Every pattern between two bfloat16 numbers, subnormal ones included, and back."""
    patterns = torch.cat([torch.arange(start, start + 0x20000, 97) for start in (0, 0x3F800000, 0x7F7D0000)])
    values = patterns.to(torch.int32).view(torch.float32)
    values = torch.cat([values, -values]).to(stored)
    stated = Combination(coefficients=np.ones(1))
    assert_agrees(cpu.run, stated, elements([values], base=None), BF16)


# Whole methods.


class Source:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self, name: str) -> Tensor:
        return self._tensor

    def content_hash(self) -> str:
        raise AssertionError

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        pass


WITH_OPERATION = [
    (name, base)
    for name, method in sorted(METHODS.items())
    if method.combination or method.task_vectors
    for base in {BasePolicy.REQUIRED: [0], BasePolicy.OPTIONAL: [None, 0], BasePolicy.IGNORED: [None]}[
        method.base
    ]
]


@pytest.mark.parametrize(("name", "base"), WITH_OPERATION)
@pytest.mark.parametrize("shape", [(31, 40), (), (1,), (7, 1), (2, 3, 5)])
def test_every_methods_operation(name: str, base: int | None, shape: tuple[int, ...]) -> None:
    method = METHODS[name]
    number = (method.max_others or 2) + (base is not None)
    models = [f"model {index}" for index in range(number)]
    inputs = tensors(math.prod(shape), *[BF16] * number, change=0.3)
    switches = [item.name for item in method.parameters if item.kind == "bool" and item.name != "int8_mask"]
    choices = itertools.product([False, True], repeat=len(switches))
    for density, choice in itertools.product([0.3, 1.0], choices):
        given = {"weight": 0.7, "density": density, "gamma": 0.1, "epsilon": 0.1, "scale": 0.7}
        shared = {item.name: item.default for item in method.parameters if item.scope is Scope.RECIPE}
        plan = TensorPlan(
            name="layers.0.w",
            shape=shape,
            dtype="bfloat16",
            inputs=tuple((model, "w") for model in models),
            base=base,
            method=method,
            shared={**shared, "t": 0.3, **dict(zip(switches, choice, strict=True))},
            values=tuple({**given, "density": 1.0} if index == 2 else given for index in range(number)),
            seed=5,
        )
        sources = {model: Source(tensor.view(shape)) for model, tensor in zip(models, inputs, strict=True)}
        prepared = prepare_tensor(plan, Bank(sources))
        assert prepared.operation is not None
        whole = elements(inputs, base=base, shape=shape, seed=5, stated=prepared.operation)
        found = assert_agrees(cpu.run, prepared.operation, whole, BF16)
        assert found.isfinite().all()
        out = torch.empty_like(found)
        assert prepared.write(out)
        assert out.equal(found)


# Statistics.


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F16, F16), (BF16, F32), (F64, F32)])
@pytest.mark.parametrize("count", [0, 1, 7, 1001, BIG])
def test_histograms_are_the_references(
    dtypes: tuple[torch.dtype, torch.dtype], count: int, threads: int
) -> None:
    base, source = tensors(count, *dtypes)
    expected = Histogram.of(source.float() - base.float())
    np.testing.assert_array_equal(cpu.histogram(base, source).table, expected.table)


def test_histograms_of_extreme_and_broken_tensors() -> None:
    edges = [0.0, -0.0, 1e-45, 1e-39, 1.0, 3.4e38, math.inf, -math.inf, math.nan]
    source = torch.tensor(edges)
    for base in (torch.zeros(9), torch.ones(9)):
        expected = Histogram.of(source - base).table
        np.testing.assert_array_equal(cpu.histogram(base, source).table, expected)


def test_a_tensor_of_any_shape_has_a_histogram() -> None:
    base, source = (tensor.view(20, 30) for tensor in tensors(600, F32, F32))
    expected = Histogram.of((source - base).T).table
    np.testing.assert_array_equal(cpu.histogram(base.T, source.T).table, expected)
    scalar = cpu.histogram(torch.tensor(1.0), torch.tensor(3.5))
    assert (scalar.num_elements, scalar.norm) == (1, 2.5)


@pytest.mark.parametrize("base", [None, 0, 2])
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, F32, F32), (F16, BF16, F64)])
@pytest.mark.parametrize("count", [0, 1, 1001, BIG])
def test_inner_products_are_the_references(
    base: int | None, dtypes: tuple[torch.dtype, ...], count: int, threads: int
) -> None:
    given = [tensor.float() for tensor in tensors(count, *dtypes, change=0.3)]
    stored = tensors(count, *dtypes, change=0.3)
    kind = GramKind.TENSORS if base is None else GramKind.TASK_VECTORS
    inputs = MergeInputs(name="w", tensors=given, base=base, shared={}, values=(), seed=0)
    others = [tensor for index, tensor in enumerate(stored) if index != base]
    found = cpu.gram(others, None if base is None else stored[base])
    np.testing.assert_allclose(found, gram_matrices(inputs, kind, Axis.WHOLE), rtol=1e-12)
    np.testing.assert_array_equal(found, found.T)


def test_inner_products_do_not_depend_on_threads() -> None:
    given = tensors(3 * BIG, BF16, BF16)
    before = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(cpu.gram(given, None))
    torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_inner_products_of_task_vectors_do_not_cancel() -> None:
    base = torch.full((1000,), 1000.0)
    source = base + torch.linspace(-1, 1, 1000) * 2.0**-13
    exact = float((source.double() - base.double()).square().sum())
    assert cpu.gram([source], base)[0, 0] == pytest.approx(exact, rel=1e-14)
