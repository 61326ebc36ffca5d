"""Runs operations on the CPU, on several threads; the loops themselves are in `cpu_loops`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.merge.counter_hash import keys
from evomerge.merge.histogram import NUM_BINS, Band, Cut, Histogram
from evomerge.merge.kernels import reference
from evomerge.merge.kernels.reference import Elements, Operation
from evomerge.merge.kernels.threads import num_threads, spread
from evomerge.merge.methods.base import Axis, Combination
from evomerge.merge.methods.task_vectors import Random, Ranked, TaskVectorSum, Term, ranked_line

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PIECE = 1 << 16
"""Elements that threads share a tensor out by, and that are converted at once where types are mixed."""
BLOCK = 1 << 22
"""Elements that statistics look at before they say that they are done with them."""
_OVERFLOW = {2: 0x7F7F8000, 4: 0x7F800000}
"""Size of the output's type -> smallest float32 pattern that is not finite in it."""


def run(operation: Operation, elements: Elements, out: Tensor) -> bool:
    """Carry out an operation; see `reference.run`, whose results it gives bit for bit."""
    import torch

    native = {torch.bfloat16, torch.float32}
    types = {tensor.dtype for tensor in elements.tensors}
    if len(types) == 1 and types <= native and out.dtype in native and out.is_contiguous():
        return _in_parallel(lambda part, piece: _run(operation, part, piece), elements, out)
    if torch.float64 in types or out.dtype == torch.float64:
        return reference.run(operation, elements, out)
    return _in_parallel(lambda part, piece: _run_converted(operation, part, piece), elements, out)


def _run_converted(operation: Operation, elements: Elements, out: Tensor) -> bool:
    """Through float32, piece by piece, where the loops do not know a type or types are mixed."""
    import torch

    finite = True
    for start in range(0, elements.count, PIECE):
        part = elements.part(start, min(start + PIECE, elements.count))
        as_float = Elements(
            name=part.name,
            seed=part.seed,
            shape=part.shape,
            first=part.first,
            tensors=[tensor.float() for tensor in part.tensors],
            base=part.base,
            ranks=part.ranks,
        )
        merged = torch.empty(part.count)
        finite &= _run(operation, as_float, merged)
        piece = out[start : start + PIECE]
        piece.copy_(merged)
        finite &= bool(piece.isfinite().all())
    return finite


def _run(operation: Operation, elements: Elements, out: Tensor) -> bool:
    count, limit = elements.count, _OVERFLOW[out.itemsize]
    if elements.first % 2**32 + count <= 2**32:
        return _run_within(operation, elements, out) < limit
    parts = _below_2_32(elements.first, count)
    return all(_run_within(operation, elements.part(*part), out[slice(*part)]) < limit for part in parts)


def _run_within(operation: Operation, elements: Elements, out: Tensor) -> int:
    """A run that crosses no multiple of 2^32; returns the largest bit pattern of an absolute result."""
    tensors = tuple(flat(tensor) for tensor in elements.tensors)
    target = flat(out)
    if isinstance(operation, TaskVectorSum):
        return _sum_task_vectors(operation, elements, target, tensors)
    if operation.axis is Axis.WHOLE:
        return _combine(operation, operation.coefficients, elements.base, target, tensors)
    return _combine_along(operation, elements, target, tensors)


def _below_2_32(first: int, count: int) -> list[tuple[int, int]]:
    """Cut a run where the upper half of positions changes: kernels count in 32 bits."""
    cuts = [0, *range(2**32 - first % 2**32, count, 2**32), count]
    return list(itertools.pairwise(cuts))


def _sum_task_vectors(
    stated: TaskVectorSum,
    elements: Elements,
    out: NDArray[Any],
    tensors: Sequence[NDArray[Any]],
) -> int:
    from evomerge.merge.kernels import cpu_loops

    assert elements.base is not None
    base = tensors[elements.base]
    # Without terms, one that adds nothing: kernels take no empty tuples.
    terms = stated.terms or (Term(source=elements.base, weight=0.0),)
    sources = tuple(tensors[term.source] for term in terms)
    # A term that keeps everything beside ranked ones has no ranks, and looks at none.
    ranks = {source: flat(values) for source, values in elements.ranks.items()}
    anything = next(iter(ranks.values()), None)
    ranked = tuple(ranks.get(term.source, anything) for term in terms) if ranks else None
    c = constants(terms, seed=elements.seed, name=elements.name)
    factors = tuple(term.factor for term in terms)
    place = (float(stated.scale), *first_key(elements, elements.first))
    if not stated.elect:
        divisor = float(stated.divisor)
        top = cpu_loops.add_terms(out, base, sources, ranked, c, factors, divisor, *place)
    else:
        weights = tuple(float(term.weight) for term in terms) if stated.normalize else None
        top = cpu_loops.elect_terms(out, base, sources, ranked, c, factors, weights, *place)
    return int(top)


def first_key(elements: Elements, first: int) -> tuple[np.uint32, np.uint32]:
    """First key of the counter hash with the upper half of positions mixed in, and their lower half."""
    k0, _ = keys(elements.seed, elements.name, 0)
    return np.uint32(k0 ^ ((first >> 32) * 0x9E3779B9 & 0xFFFFFFFF)), np.uint32(first % 2**32)


def constants(terms: Sequence[Term], *, seed: int, name: str) -> tuple[tuple[np.uint32, ...], ...]:
    """What the kernels need to know of what each term keeps, all of one kind, told by its length.

    Args:
        terms: The terms of one sum.
        seed: The recipe's seed.
        name: Name of the output tensor.
    """
    kinds = {type(term.keep) for term in terms}
    bands = [term.keep for term in terms if isinstance(term.keep, Band)]
    result = []
    for term in terms:
        keep = term.keep
        _, k1 = keys(seed, name, term.source)
        values: tuple[int, ...]
        if kinds == {type(None)}:
            values = (0,)
        elif bands:
            low, high = (keep.low, keep.high) if isinstance(keep, Band) else (_NO_CUT, None)
            values = (low.inside, low.outside, low.last)
            if any(band.high for band in bands):
                high = high or _NO_LIMIT
                values += (high.inside, high.outside, high.last)
            values += (k1,)
        elif Ranked in kinds:
            lowest, step = ranked_line(keep) if isinstance(keep, Ranked) else (1.0, 0.0)
            rescaled = isinstance(keep, Ranked) and keep.rescale
            values = (_bits(lowest), _bits(step), int(rescaled), k1, 0)
        else:
            values = (max(0, keep.last) if isinstance(keep, Random) else 2**32 - 1, k1)
        result.append(tuple(map(np.uint32, values)))
    return tuple(result)


_NO_CUT = Cut(inside=0, outside=0, last=0)
_NO_LIMIT = Cut(inside=1 << 31, outside=1 << 31, last=0)


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


def _combine(
    operation: Combination,
    coefficients: NDArray[np.float64],
    base: int | None,
    out: NDArray[Any],
    tensors: Sequence[NDArray[Any]],
) -> int:
    from evomerge.merge.kernels import cpu_loops

    c = tuple(coefficients.tolist())
    divisor = float(operation.divisor)
    if not operation.around_base:
        return int(cpu_loops.combine(out, tuple(tensors), c, divisor))
    assert base is not None
    others = [index for index in range(len(tensors)) if index != base]
    sources, factors = tuple(tensors[i] for i in others), tuple(c[i] for i in others)
    every = ((np.uint32(0),),) * len(others)
    place = (1.0, np.uint32(0), np.uint32(0))
    top = cpu_loops.add_terms(out, tensors[base], sources, None, every, factors, divisor, *place)
    return int(top)


def _combine_along(
    operation: Combination,
    elements: Elements,
    out: NDArray[Any],
    tensors: Sequence[NDArray[Any]],
) -> int:
    """A coefficient per row or column."""
    from evomerge.merge.kernels import cpu_loops

    by_row = operation.axis is Axis.ROWS
    length = reference.num_columns(elements.shape, operation.axis)
    with np.errstate(over="ignore"):
        c = operation.coefficients.astype(np.float32)
    base = tensors[elements.base] if operation.around_base and elements.base is not None else None
    others = [i for i in range(len(tensors)) if base is None or i != elements.base]
    sources, chosen = tuple(tensors[i] for i in others), np.ascontiguousarray(c[:, others])
    divisor = float(operation.divisor)
    return int(cpu_loops.combine_along(out, base, sources, chosen, divisor, elements.first, length, by_row))


def _in_parallel(work: Callable[[Elements, Tensor], bool], elements: Elements, out: Tensor) -> bool:
    """Share a run out among the threads; a small one is done at once."""
    parts = _parts(elements.count)
    if len(parts) == 1:
        return work(elements, out)
    return all(spread(lambda part: work(elements.part(*part), out[slice(*part)]), parts))


def _parts(count: int) -> list[tuple[int, int]]:
    size = -(-count // num_threads())
    size = max(PIECE, -(-size // PIECE) * PIECE)
    return [(start, min(start + size, count)) for start in range(0, count, size)] or [(0, 0)]


def histogram(base: Tensor, source: Tensor, done: Callable[[int, int], None] | None = None) -> Histogram:
    """Histogram of the task vector of a source; see `Histogram.of`.

    Args:
        base: Tensor of the base.
        source: Tensor of the source.
        done: Called with the position and number of elements that are not looked at again.
    """
    from evomerge.merge.kernels import cpu_loops

    counts, sums = np.zeros(NUM_BINS, np.int64), np.zeros(NUM_BINS, np.int64)
    for first, end in _blocks(source.numel()):
        lines = [flat(line) for line in _comparable([base, source], first, end)]

        def count(part: tuple[int, int], lines: Sequence[NDArray[Any]] = lines) -> NDArray[np.int64]:
            table = np.zeros((2, NUM_BINS), np.int64)
            cpu_loops.count_magnitudes(table[0], table[1], *(line[slice(*part)] for line in lines))
            return table

        for table in spread(count, _parts(end - first)):
            counts += table[0]
            sums += table[1]
        if done is not None:
            done(first, end - first)
    return Histogram.from_counts(counts, sums)


def gram(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    done: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Inner products of N tensors, or of their differences from a base, float64 [N, N].

    Products are summed by pieces that start at multiples of `PIECE`, so that the number of threads does not
    change the result.

    Args:
        tensors: The tensors.
        base: The base, or None.
        done: As for `histogram`.
    """
    from evomerge.merge.kernels import cpu_loops

    total = np.zeros((len(tensors), len(tensors)))
    for first, end in _blocks(tensors[0].numel()):
        lines = _comparable([*tensors, *([] if base is None else [base])], first, end)
        arrays = tuple(flat(line) for line in lines)
        pieces = np.zeros((max(1, -(-(end - first) // PIECE)), *total.shape))

        def multiply(
            part: tuple[int, int],
            arrays: tuple[NDArray[Any], ...] = arrays,
            pieces: NDArray[np.float64] = pieces,
        ) -> None:
            for start in range(*part, PIECE):
                piece = slice(start, min(start + PIECE, part[1]))
                cut = tuple(array[piece] for array in arrays)
                others = cut[: len(tensors)]
                cpu_loops.dots(pieces[start // PIECE], others, None if base is None else cut[-1])

        spread(multiply, _parts(end - first))
        total += pieces.sum(axis=0)
        if done is not None:
            done(first, end - first)
    return total


def _blocks(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)] or [(0, 0)]


def _comparable(tensors: Sequence[Tensor], first: int, end: int) -> list[Tensor]:
    """Elements first <= e < end of the tensors, flat, in one type that the loops know."""
    import torch

    lines = [tensor.reshape(-1)[first:end] for tensor in tensors]
    types = {line.dtype for line in lines}
    native = len(types) == 1 and types <= {torch.bfloat16, torch.float32}
    return lines if native else [line.float() for line in lines]


def flat(tensor: Tensor) -> NDArray[Any]:
    """A contiguous tensor as the flat array that the loops take: bfloat16 as uint16."""
    import torch

    line = tensor.view(-1)
    array: NDArray[Any] = (line.view(torch.uint16) if line.itemsize == 2 else line).numpy()
    return array
