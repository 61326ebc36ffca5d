"""Operations that the GPU's kernels are tried on, and two ways to try them without a GPU.

    python -m tests.merge.kernels.gpu_cases interpret    results in Triton's interpreter against the reference
    python -m tests.merge.kernels.gpu_cases compile      code for real GPUs from what `gpu.run` would launch

The interpreter takes much that the compiler refuses. Each prints a JSON object, case -> its fault or "". They
are programs of their own as Triton reads `TRITON_INTERPRET` once, and torch may import it at any time.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.counter_hash import hash_element, keys, tie_number
from evomerge.merge.histogram import BIN_SHIFT, TIES, Band, Histogram
from evomerge.merge.kernels import gpu, reference
from evomerge.merge.kernels.reference import Elements, Operation
from evomerge.merge.methods.base import Axis, Combination
from evomerge.merge.methods.task_vectors import Keep, Random, Ranked, TaskVectorSum, Term, row_ranks

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {
    "bf16": ([BF16], BF16),
    "f16": ([F16], F16),
    "f32": ([F32], F32),
    "mixed to bf16": ([F32, BF16, F16], BF16),
    "mixed to f32": ([BF16, F16, F32], F32),
}
FAR = 2**33 + 17
ACROSS = 2**32 - 700


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation, its inputs on the CPU, and the type to round to."""

    operation: Operation
    elements: Elements
    dtype: torch.dtype


def family(count: int, types: list[torch.dtype], total: int, seed: int) -> list[Tensor]:
    """A base and its relatives, each of the next type; a part of the elements are equal in all."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    change = torch.rand(count, generator=generator) < 0.8
    given = [base] + [
        base + 0.02 * torch.randn(count, generator=generator) * change for _ in range(total - 1)
    ]
    return [tensor.to(dtype) for tensor, dtype in zip(given, itertools.cycle(types), strict=False)]


def keeps(deltas: list[Tensor]) -> dict[str, list[Keep]]:
    """What is kept of each of the task vectors, by a name of the whole."""
    histograms, count = [Histogram.of(delta) for delta in deltas], deltas[0].numel()
    low: list[Keep] = [table.largest(max(1, round(0.37 * count))) for table in histograms]
    both: list[Keep] = [table.band(count // 5, max(count // 5 + 1, count // 2)) for table in histograms]
    random: list[Keep] = [Random.share(0.2 + 0.1 * index) for index in range(len(deltas))]
    ranked: list[Keep] = [
        Ranked(lowest=0.1, highest=0.2 * (index + 1), rescale=index % 2 == 0) for index in range(len(deltas))
    ]
    every: list[Keep] = [None] * len(deltas)

    def mixed(*kinds: list[Keep]) -> list[Keep]:
        return [kinds[index % len(kinds)][index] for index in range(len(deltas))]

    return {
        "everything": every,
        "random": random,
        "largest": low,
        "band": both,
        "ranked": ranked,
        "random, everything": mixed(random, every),
        "largest, everything": mixed(low, every),
        "band, largest": mixed(both, low),
        "band, everything": mixed(both, every),
        "ranked, everything": mixed(ranked, every),
    }


def sum_cases() -> dict[str, Case]:
    modes = {"added": (0, 0), "divided": (0, 1), "elected": (1, 0), "elected and divided": (1, 1)}
    places = [(1, 7), (1023, 0), (1024, FAR), (1025, ACROSS), (2500, ACROSS)]
    weights = [0.7, -0.4, 1.3, 0.25]
    kinds = list(keeps([torch.ones(1)]))
    result = {}
    for number, (kind, mode) in enumerate(itertools.product(kinds, modes)):
        # Coprime steps bring together every size, type and number of sources.
        count, first = places[number % len(places)]
        name = list(TYPES)[(number // 4 + number) % len(TYPES)]
        types, dtype = TYPES[name]
        num_terms = 1 + (number // 2 + number) % 4
        tensors = family(count, types, num_terms + 1, number)
        at = number % (num_terms + 1)
        others = [index for index in range(num_terms + 1) if index != at]
        deltas = [tensors[index].float() - tensors[at].float() for index in others]
        kept = keeps(deltas)[kind]
        terms = tuple(
            Term(source=source, weight=weights[index], keep=kept[index], rescale=1.1)
            for index, source in enumerate(others)
        )
        elect, normalize = modes[mode]
        ranks = {
            term.source: row_ranks(delta).to(torch.uint16)
            for term, delta in zip(terms, deltas, strict=True)
            if isinstance(term.keep, Ranked)
        }
        result[f"{kind}, {mode}: {num_terms} of {name}, {count} from {first}"] = Case(
            operation=TaskVectorSum(terms=terms, elect=bool(elect), normalize=bool(normalize), scale=0.9),
            elements=elements(tensors, base=at, first=first, ranks=ranks),
            dtype=dtype,
        )
    return result


def elements(tensors: list[Tensor], **given: Any) -> Elements:
    first = given.get("first", 0)
    defaults = {"name": "w", "seed": 5, "shape": (first + tensors[0].numel(),), "first": first, "base": None}
    return Elements(tensors=tensors, **{**defaults, **given})


def combination_cases() -> dict[str, Case]:
    result = {}
    # Shape, first position, count; 64-bit positions need few and long lines.
    places: dict[Axis, list[tuple[tuple[int, ...], int, int]]] = {
        Axis.WHOLE: [((3000,), 0, 3000), ((1,), 0, 1), ((2**33, 3), FAR, 1025)],
        Axis.ROWS: [((7, 333), 0, 7 * 333), ((7, 333), 500, 1300), ((5, 2**31), ACROSS, 1400)],
        Axis.COLUMNS: [((7, 333), 0, 7 * 333), ((7, 3, 111), 500, 1300), ((2**33, 3), FAR, 1025)],
    }
    numbers = itertools.count()
    for axis, around_base in itertools.product(places, (False, True)):
        for shape, first, count in places[axis]:
            number = next(numbers)
            name = list(TYPES)[number % len(TYPES)]
            types, dtype = TYPES[name]
            num_inputs = 2 + number % 3 if around_base else 1 + number % 4
            lines = {Axis.WHOLE: (), Axis.ROWS: shape[:1], Axis.COLUMNS: (int(np.prod(shape[1:])),)}[axis]
            c = np.random.default_rng(number).normal(size=(*lines, num_inputs))
            at = number % num_inputs if around_base else None
            if at is not None:
                c[..., at] = 0
            tensors = family(count, types, num_inputs, number)
            case = f"{axis}{' around the base' * around_base}: {num_inputs} of {name}, {count} from {first}"
            result[f"combination by {case} of {list(shape)}"] = Case(
                operation=Combination(
                    coefficients=c, axis=axis, around_base=around_base, divisor=(1.0, -1.7, 0.3)[number % 3]
                ),
                elements=elements(tensors, base=at, shape=shape, first=first),
                dtype=dtype,
            )
    return result


def edge_cases() -> dict[str, Case]:
    half = Combination(coefficients=np.array([1.0]))
    result = {}
    limits = {BF16: 0x7F7F8000, F16: 0x477FF000, F32: 0x7F800000}
    for dtype, limit in limits.items():
        for text, pattern in (("below", limit - 1), ("at", limit), ("negative at", limit | 0x80000000)):
            tensor = torch.linspace(-1, 1, 1500)
            tensor[1400] = float(np.uint32(pattern).view(np.float32))
            result[f"{text} the limit of {dtype}"] = Case(
                operation=half, elements=elements([tensor]), dtype=dtype
            )
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors = family(1100, [BF16], 3, 9)
        tensors[1][1099] = value
        terms = tuple(Term(source=source, weight=0.5) for source in (1, 2))
        for elect in (False, True):
            operation = TaskVectorSum(terms=terms, elect=elect, normalize=True, scale=1.0)
            given = elements(tensors, base=0)
            result[f"{value}, elected: {elect}"] = Case(operation=operation, elements=given, dtype=BF16)
    signs = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, 65504.0, 3e-8, 2**-24, 2**-25])
    for dtype in limits:
        base, other = torch.cartesian_prod(signs, signs).T.contiguous().to(dtype)
        for elect in (False, True):
            terms = tuple(Term(source=source, weight=weight) for source, weight in ((1, 0.6), (2, -0.3)))
            operation = TaskVectorSum(terms=terms, elect=elect, normalize=True, scale=1.0)
            given = elements([base, other, other.flip(0)], base=0)
            name = f"zeros and tiny numbers of {dtype}, elected: {elect}"
            result[name] = Case(operation=operation, elements=given, dtype=dtype)
    tensors = family(1100, [F32], 2, 4)
    for kind, keep in keeps_at_element(700, tensors[1] - tensors[0]).items():
        terms = (Term(source=1, weight=0.5, keep=keep),)
        ranks = {1: row_ranks(tensors[1] - tensors[0]).to(torch.uint16)} if kind == "ranked" else {}
        result[f"the hash of an element is the last that counts, {kind}"] = Case(
            operation=TaskVectorSum(terms=terms, elect=False, normalize=False, scale=1.0),
            elements=elements(tensors, base=0, ranks=ranks),
            dtype=F32,
        )
    nothing = TaskVectorSum(terms=(), elect=True, normalize=True, scale=1.0)
    for operation in (nothing, Combination(coefficients=np.array([0.5, 0.5]))):
        for count in (0, 10):
            given = elements(family(count, [BF16, F32], 2, 1), base=1)
            name = f"{count} elements, {type(operation).__name__}"
            result[name] = Case(operation=operation, elements=given, dtype=BF16)
    return result


def keeps_at_element(e: int, delta: Tensor) -> dict[str, Keep]:
    """What is kept hangs on the hash of one element, the uniform number it stands for, or its key."""
    both_keys = keys(5, "w", 1)
    h = hash_element(e, *both_keys)
    key = (int(delta[e].abs().view(torch.int32)) >> BIN_SHIFT) * TIES + tie_number(e, *both_keys)
    chance = (h >> 8) * 2.0**-24
    return {
        "random": Random(last=h),
        "largest": Band(key),
        "smallest": Band(0, key),
        "band": Band(key, key),
        "beside": Band(key + 1, key + TIES),
        "ranked": Ranked(lowest=chance, highest=chance, rescale=True),
    }


def cases() -> dict[str, Case]:
    return {**sum_cases(), **combination_cases(), **edge_cases()}


def fault(case: Case, *, device: str = "cpu", max_ulps: int = 0) -> str:
    """How the kernel's result differs from the reference's; empty where it does not."""
    given, count = case.elements, case.elements.count
    expected, found = torch.empty(count, dtype=case.dtype), torch.full((count + 1,), 7, dtype=case.dtype)
    finite = reference.run(case.operation, given, expected)
    found = found.to(device)
    there = Elements(
        name=given.name,
        seed=given.seed,
        shape=given.shape,
        first=given.first,
        tensors=[tensor.to(device) for tensor in given.tensors],
        base=given.base,
        ranks={source: ranks.to(device) for source, ranks in given.ranks.items()},
    )
    if gpu.run(case.operation, there, found[:count]) != finite:
        return f"finite is {finite} for the reference only"
    if float(found[count]) != 7:
        return "wrote beyond the end"
    apart = (ordered(found[:count].cpu()) - ordered(expected)).abs() * expected.isfinite()
    if not count or apart.max() <= max_ulps:
        return ""
    place = int(apart.argmax())
    values = f"{float(found[place])!r} instead of {float(expected[place])!r}"
    return f"element {place}: {values}, {int(apart[place])} units in the last place"


def ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart for neighbours; -0 comes before 0."""
    bits = tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16).long()
    largest = (1 << (8 * tensor.itemsize - 1)) - 1
    return torch.where(bits < 0, -(bits & largest) - 1, bits)


class OnlyCompiled:
    """A kernel that is compiled for what it is launched with, and not run.

    Args:
        kernel: The kernel.
        compiled: Called with the result.
    """

    def __init__(self, kernel: Any, compiled: Callable[[Any], None]) -> None:
        self._kernel = kernel
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **given: self._compiled(self._kernel.warmup(*args, grid=grid, **given))


class Driver:
    """A GPU that can be compiled for, and no more."""

    def __init__(self, *target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self._target)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all() -> dict[str, str]:
    """Compile the kernels of the sums and combinations for an A100; of one, for other GPUs too."""
    import triton

    from evomerge.merge.kernels import gpu_loops

    made: list[Any] = []
    for name in ("add_terms", "combine"):
        setattr(gpu_loops, name, OnlyCompiled(getattr(gpu_loops, name), made.append))
    faults = {}
    every = {**sum_cases(), **combination_cases()}
    some = {name: every[name] for name in list(every)[2::9]}
    targets = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
    for target, chosen in {"sm_80": every, "sm_90": some, "gfx942": some}.items():
        triton.runtime.driver.set_active(Driver(*targets[target]))
        for name, case in chosen.items():
            made.clear()
            out = torch.empty(case.elements.count, dtype=case.dtype)
            gpu.run(case.operation, case.elements, out)
            code = "".join(kernel.asm.get("ptx", "") for kernel in made)
            contracted = sorted(
                set(re.findall(r"fma\S*f32", code)) | set(re.findall(r"div\.(?:full|approx)\S*", code))
            )
            faults[f"{target}: {name}"] = f"inexact: {contracted}" if contracted or not made else ""
    return faults


def main(what: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # Elements beyond the end of a block are computed like the others, from zeros, and thrown away.
    faults: dict[str, str]
    with np.errstate(all="ignore"):
        faults = compile_all() if what == "compile" else {name: fault(case) for name, case in cases().items()}
    json.dump(faults, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
