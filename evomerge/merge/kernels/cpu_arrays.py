"""Runs operations on flat arrays on the CPU, on several threads; the loops themselves are in `cpu_loops`.

Arrays have the form that the loops take: bfloat16 as uint16, or float32. Nothing here needs torch, whose import takes
longer than many a merge; tensors come by `cpu`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.merge.counter_hash import keys
from evomerge.merge.histogram import LAST_KEY, NUM_BINS, Band, Histogram
from evomerge.merge.kernels import reference
from evomerge.merge.kernels.reference import Elements, Operation
from evomerge.merge.kernels.threads import num_threads, spread
from evomerge.merge.methods.base import Axis, Combination
from evomerge.merge.methods.task_vectors import Random, Ranked, TaskVectorSum, Term, ranked_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from evomerge.merge.kernels.reference import Line

PIECE = 1 << 16
"""Elements that threads share a tensor out by, and that are converted at once where types are mixed."""
BLOCK = 1 << 22
"""Elements that statistics look at before they say that they are done with them."""
READ = 1 << 17
"""Elements of a tensor that a thread asks for at once: those of several stay in its processor's cache."""
_OVERFLOW = {2: 0x7F7F8000, 4: 0x7F800000}
"""Size of the output's type -> smallest float32 pattern that is not finite in it."""

Read = Callable[[int, int], "Sequence[NDArray[Any]]"]
"""Gives the elements first <= e < end of several tensors, all in one type that the loops know.

They stay as they are until the same thread asks again.
"""
Done = Callable[[int, int], None]

_local = threading.local()


def run(operation: Operation, elements: Elements[NDArray[Any]], out: NDArray[Any]) -> bool:
    """Carry out an operation on arrays; see `reference.run`, whose results it gives bit for bit."""
    return in_parallel(lambda part, piece: run_part(operation, part, piece), elements, out)


def run_part(operation: Operation, elements: Elements[NDArray[Any]], out: NDArray[Any]) -> bool:
    """As `run`, on this thread."""
    return prepared_at(operation, places(elements, out, alike=treats_alike(operation)))()


Check = Callable[[], bool]
"""Computes a run of elements; whether all results are finite."""
Place = Callable[[Operation], Check]
"""A run of elements in the form that loops take, and where its results go: gives what computes it by an operation."""


def treats_alike(operation: Operation) -> bool:
    """Whether an operation does the same to all elements, wherever in a row or column they are."""
    return isinstance(operation, TaskVectorSum) or operation.axis is Axis.WHOLE


def places(elements: Elements[NDArray[Any]], out: NDArray[Any], *, alike: bool = True) -> list[Place]:
    """The places of a run of elements, for any number of operations that all treat elements alike, or none does."""
    first, count = elements.first, elements.count
    if not count:
        return []
    # Kernels count in 32 bits.
    if first % 2**32 + count > 2**32:
        cuts = itertools.pairwise([0, *range(2**32 - first % 2**32, count, 2**32), count])
        parts = [places(elements.part(start, end), out[start:end], alike=alike) for start, end in cuts]
        return [place for part in parts for place in part]
    if alike and out.itemsize == elements.tensors[0].itemsize == 2:
        return list(_places_of_pairs(elements, out))
    return [partial(_bound, elements=elements, out=out, limit=_OVERFLOW[out.itemsize])]


def prepared_at(operation: Operation, where: Sequence[Place]) -> Check:
    """What does as `run_part` when it is called; nothing is left to Python then but to call loops."""
    checks = [place(operation) for place in where]
    return checks[0] if len(checks) == 1 else partial(_all, checks)


def _all(checks: Sequence[Check]) -> bool:
    finite = True
    for check in checks:
        finite &= check()
    return finite


def _bound(operation: Operation, *, elements: Elements[NDArray[Any]], out: NDArray[Any], limit: int) -> Check:
    loop = _loop(operation, elements, out)
    return lambda: bool(loop() < limit)


def _places_of_pairs(elements: Elements[NDArray[Any]], out: NDArray[Any]) -> Iterator[Place]:
    """A place for the pairs from even positions, and one for what is left over at an end."""
    start, end, limit = elements.first % 2, elements.count, _OVERFLOW[out.itemsize]
    end -= (end - start) % 2
    if start < end:
        pairs = elements.part(start, end).each(_as_pairs)
        yield partial(_bound, elements=pairs, out=_as_pairs(out[start:end]), limit=limit)
    if start:
        yield _half_of_pair(elements.part(0, 1), out[:1])
    if end < elements.count:
        yield _half_of_pair(elements.part(end, end + 1), out[end:])


def _as_pairs(line: NDArray[Any]) -> NDArray[Any]:
    return line.view(np.uint32)


def _half_of_pair(element: Elements[NDArray[Any]], out: NDArray[Any]) -> Place:
    """For one element, in a pair that is nowhere else."""
    half, written = element.first % 2, np.zeros(2, np.uint16)

    def in_pair(line: NDArray[Any]) -> NDArray[Any]:
        pair = np.zeros(2, np.uint16)
        pair[half] = line[0]
        return _as_pairs(pair)

    pair = element.each(in_pair, first=element.first - half)

    def bound(operation: Operation) -> Check:
        check = _bound(operation, elements=pair, out=_as_pairs(written), limit=_OVERFLOW[out.itemsize])

        def computed() -> bool:
            finite = check()
            out[0] = written[half]
            return finite

        return computed

    return bound


Loop = Callable[[], int]
"""Computes a run of elements; gives the largest bit pattern of an absolute result, which tells what is not finite."""


def _loop(operation: Operation, elements: Elements[NDArray[Any]], out: NDArray[Any]) -> Loop:
    """For a run that crosses no multiple of 2^32."""
    if isinstance(operation, TaskVectorSum):
        return _sum_task_vectors(operation, elements, out)
    if operation.axis is Axis.WHOLE:
        return _combine(operation, elements, out)
    return _combine_along(operation, elements, out)


def _sum_task_vectors(stated: TaskVectorSum, elements: Elements[NDArray[Any]], out: NDArray[Any]) -> Loop:
    from evomerge.merge.kernels import cpu_loops

    assert elements.base is not None
    base = elements.tensors[elements.base]
    # Without terms, one that adds nothing: kernels take no empty tuples.
    terms = stated.terms or (Term(source=elements.base, weight=0.0),)
    sources = tuple(elements.tensors[term.source] for term in terms)
    # A term that keeps everything beside ranked ones has no ranks, and looks at none.
    ranks = elements.ranks
    anything = next(iter(ranks.values()), None)
    ranked = tuple(ranks.get(term.source, anything) for term in terms) if ranks else None
    c = constants(terms, seed=elements.seed, name=elements.name)
    factors = tuple(term.factor for term in terms)
    place = (float(stated.scale), *first_key(elements, elements.first))
    weights, divisor = None, _divisor(stated.divisor)
    if stated.elect:
        weights, divisor = tuple(float(term.weight) for term in terms), 1.0 if stated.normalize else None
    return partial(cpu_loops.add_terms, out, base, sources, ranked, c, factors, weights, divisor, *place)


def _divisor(number: float) -> float | None:
    """What loops divide by: nothing, in half the time, where it would change nothing."""
    return None if number == 1 else float(number)


def first_key(elements: Elements[Line], first: int) -> tuple[np.uint32, np.uint32]:
    """First key of the counter hash with the upper half of positions mixed in, and their lower half."""
    k0, _ = keys(elements.seed, elements.name, 0)
    return np.uint32(k0 ^ ((first >> 32) * 0x9E3779B9 & 0xFFFFFFFF)), np.uint32(first % 2**32)


def constants(terms: Sequence[Term], *, seed: int, name: str) -> tuple[tuple[int, ...], ...]:
    """What the kernels need to know of what each term keeps, all of one kind.

    The kind is told by the number of constants, filled up with zeros; the last is the source's key of the hash.
    All are below 2^32.

    Args:
        terms: The terms of one sum.
        seed: The recipe's seed.
        name: Name of the output tensor.
    """
    kinds = {type(term.keep) for term in terms}
    if kinds == {type(None)}:
        return ((0,),) * len(terms)
    limited = any(isinstance(term.keep, Band) and term.keep.highest != LAST_KEY for term in terms)
    result = []
    for term in terms:
        keep = term.keep
        values: tuple[int, ...]
        if Band in kinds:
            lowest, highest = (keep.lowest, keep.highest) if isinstance(keep, Band) else (0, LAST_KEY)
            values = (lowest, highest - lowest, 0) if limited else (lowest, 0)
        elif Ranked in kinds:
            chance, step = ranked_line(keep) if isinstance(keep, Ranked) else (1.0, 0.0)
            rescaled = isinstance(keep, Ranked) and keep.rescale
            values = (_bits(chance), _bits(step), int(rescaled), 0)
        else:
            values = (max(0, keep.last) if isinstance(keep, Random) else 2**32 - 1,)
        _, k1 = keys(seed, name, term.source)
        result.append((*values, k1))
    return tuple(result)


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


def _combine(operation: Combination, elements: Elements[NDArray[Any]], out: NDArray[Any]) -> Loop:
    from evomerge.merge.kernels import cpu_loops

    c: tuple[float, ...] = tuple(operation.coefficients.tolist())
    divisor, tensors = _divisor(operation.divisor), elements.tensors
    if not operation.around_base:
        return partial(cpu_loops.combine, out, tuple(tensors), c, divisor)
    assert elements.base is not None
    others = [index for index in range(len(tensors)) if index != elements.base]
    sources, factors = tuple(tensors[i] for i in others), tuple(c[i] for i in others)
    every = ((0,),) * len(others)
    place = (1.0, np.uint32(0), np.uint32(0))
    base = tensors[elements.base]
    return partial(cpu_loops.add_terms, out, base, sources, None, every, factors, None, divisor, *place)


def _combine_along(operation: Combination, elements: Elements[NDArray[Any]], out: NDArray[Any]) -> Loop:
    """A coefficient per row or column."""
    from evomerge.merge.kernels import cpu_loops

    by_row = operation.axis is Axis.ROWS
    length = reference.num_columns(elements.shape, operation.axis)
    with np.errstate(over="ignore"):
        c = operation.coefficients.astype(np.float32)
    tensors = elements.tensors
    base = tensors[elements.base] if operation.around_base and elements.base is not None else None
    others = [i for i in range(len(tensors)) if base is None or i != elements.base]
    sources, chosen = tuple(tensors[i] for i in others), np.ascontiguousarray(c[:, others])
    divisor = float(operation.divisor)
    place = (elements.first, length, by_row)
    return partial(cpu_loops.combine_along, out, base, sources, chosen, divisor, *place)


def in_parallel(work: Callable[[Elements[Line], Line], bool], elements: Elements[Line], out: Line) -> bool:
    """Share a run out among the threads; a small one is done at once."""
    parts = _parts(elements.count)
    if len(parts) == 1:
        return work(elements, out)
    return all(spread(lambda part: work(elements.part(*part), out[slice(*part)]), parts))


def _parts(count: int) -> list[tuple[int, int]]:
    size = -(-count // num_threads())
    size = max(PIECE, -(-size // PIECE) * PIECE)
    return [(start, min(start + size, count)) for start in range(0, count, size)] or [(0, 0)]


def histogram(read: Read, count: int, *, piece: int = READ, done: Done | None = None) -> Histogram:
    """Histogram of the task vector of a source; see `Histogram.of`.

    Args:
        read: Gives base and source.
        count: Number of elements.
        piece: How many a thread asks for at once.
        done: Called with the position and number of elements that are not looked at again.
    """
    from evomerge.merge.kernels import cpu_loops

    def counted(part: tuple[int, int]) -> NDArray[np.int64]:  # bins, counts and sums
        table = _table()
        for start in range(*part, piece):
            base, source = read(start, min(start + piece, part[1]))
            cpu_loops.count_magnitudes(table, base, source)
        found = np.empty((3, NUM_BINS), np.int64)
        return found[:, : cpu_loops.take_occupied(*found, table)].copy()

    found = []
    for first, end in _blocks(count):
        found += spread(counted, [(first + start, first + stop) for start, stop in _parts(end - first)])
        if done is not None:
            done(first, end - first)
    return Histogram.from_counts(*(found[0] if len(found) == 1 else _added(found)))


def _table() -> NDArray[np.uint64]:
    """The thread's own table, zero; a new one would cost as much as counting a small tensor."""
    if not hasattr(_local, "table"):
        _local.table = np.zeros(NUM_BINS, np.uint64)
    table: NDArray[np.uint64] = _local.table
    return table


def _added(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    counts, sums = np.zeros((2, NUM_BINS), np.int64)
    for bins, part_counts, part_sums in parts:
        counts[bins] += part_counts
        sums[bins] += part_sums
    bins = np.flatnonzero(counts)
    return np.stack([bins, counts[bins], sums[bins]])


def gram(
    read: Read, count: int, *, number: int, around_base: bool, done: Done | None = None
) -> NDArray[np.float64]:
    """Inner products of N tensors, or of their differences from a base, float64 [N, N].

    Products are summed by pieces that start at multiples of `PIECE`, so that the number of threads does not
    change the result.

    Args:
        read: Gives the tensors, the base behind them if there is one.
        count: Number of elements of each.
        number: N.
        around_base: Whether there is a base.
        done: As for `histogram`.
    """
    from evomerge.merge.kernels import cpu_loops

    total = np.zeros((number, number))
    for first, end in _blocks(count):
        pieces = np.zeros((max(1, -(-(end - first) // PIECE)), *total.shape))

        def multiply(part: tuple[int, int], first: int = first, pieces: NDArray[np.float64] = pieces) -> None:
            for start in range(*part, PIECE):
                arrays = tuple(read(first + start, first + min(start + PIECE, part[1])))
                cpu_loops.dots(pieces[start // PIECE], arrays[:number], arrays[-1] if around_base else None)

        spread(multiply, _parts(end - first))
        total += pieces.sum(axis=0)
        if done is not None:
            done(first, end - first)
    return total


def _blocks(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)] or [(0, 0)]
