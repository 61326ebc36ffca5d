"""Operations in one pass over the sources, compiled for the CPU by numba.

Every source is read once and the result written once. The loops are free of branches, so that they are
compiled to vector instructions; bfloat16 is read as `uint16` and shifted into float32, and rounded to
nearest even by hand. Nothing is contracted or reordered: the results are those of `reference`, bit for bit,
whatever the run of elements or the number of threads.

Kernels are specialised by the types of their arguments: the number of sources and what is kept of a task
vector are told from tuples' lengths (`_kept`), so that compiled code can be cached between processes.

Shapes: every array is flat, [E] elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload, register_jitable

from evomerge.merge.histogram import BIN_SHIFT

_F, _U = np.float32, np.uint32

ALL, RANDOM, LARGEST, RANKED, BAND = 1, 2, 4, 5, 7
"""Length of a term's constants -> what is kept of its task vector; see `_kept`."""


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile a loop on first use, and keep the result on disk where there is a place for it."""

    def decorate(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written to
            return njit(nogil=True, **options)(function)

    return decorate


@register_jitable
def _bits(value: Any) -> Any:
    return _F(value).view(np.uint32)


@register_jitable
def _float(bits: Any) -> Any:
    return _U(bits).view(np.float32)


@register_jitable
def _mixed(position: Any, k0: Any) -> Any:
    """The first half of `counter_hash.hash_element`, the same for every source."""
    x = _U(position ^ k0)
    x = _U(_U(x ^ _U(x >> _U(16))) * _U(0x7FEB352D))
    return _U(x ^ _U(x >> _U(15)))


@register_jitable
def _hash(mixed: Any, k1: Any) -> Any:
    """Its second half."""
    x = _U(_U(mixed ^ k1) * _U(0x846CA68B))
    return _U(_U(x ^ _U(x >> _U(16))) * _U(0x9E3779B1))


def _load(stored: Any) -> Any:
    """A stored element as float32: bfloat16 comes as its bits."""
    raise NotImplementedError


@overload(_load)
def _overload_load(stored: Any) -> Any:
    def bfloat16(stored: Any) -> Any:
        return _float(_U(_U(stored) << _U(16)))

    def float32(stored: Any) -> Any:
        return stored

    return bfloat16 if stored.bitwidth == 16 else float32


def _rounded(value: Any, like: Any) -> Any:
    """A float32 in the form it is stored in, that of `like`."""
    raise NotImplementedError


@overload(_rounded)
def _overload_rounded(value: Any, like: Any) -> Any:
    def bfloat16(value: Any, like: Any) -> Any:
        q = _bits(value)
        return np.uint16(_U(q + _U(0x7FFF) + _U(_U(q >> _U(16)) & _U(1))) >> _U(16))

    def float32(value: Any, like: Any) -> Any:
        return value

    return bfloat16 if like.bitwidth == 16 else float32


def _kept(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
    """What is left of one element of a task vector.

    Args:
        delta: The element, float32.
        mixed: Hash of its place in the tensor, before a source's key comes in.
        rank: Its rank within its row, for ranked terms.
        c: The term's constants, uint32, as signed ones would halve the speed; see `cpu.constants`.
    """
    raise NotImplementedError


@overload(_kept)
def _overload_kept(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
    def every(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
        return delta

    def random(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
        last, k1 = c
        return delta if _hash(mixed, k1) <= last else _F(delta * _F(0))

    def largest(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
        low_in, low_out, low_last, k1 = c
        low = low_in if _hash(mixed, k1) <= low_last else low_out
        return delta if _U(_bits(delta) & _U(0x7FFFFFFF)) >= low else _F(delta * _F(0))

    def ranked(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
        lowest, step, rescaled, k1, _ = c
        p = _F(_float(lowest) + _F(_F(rank) * _float(step)))
        uniform = _F(_F(np.int32(_hash(mixed, k1) >> _U(8))) * _F(2.0**-24))
        return _F(delta / (p if rescaled != _U(0) else _F(1))) if uniform < p else _F(delta * _F(0))

    def band(delta: Any, mixed: Any, rank: Any, c: Any) -> Any:
        low_in, low_out, low_last, high_in, high_out, high_last, k1 = c
        h = _hash(mixed, k1)
        low = low_in if h <= low_last else low_out
        high = high_in if h <= high_last else high_out
        magnitude = _U(_bits(delta) & _U(0x7FFFFFFF))
        return delta if (magnitude >= low) & (magnitude < high) else _F(delta * _F(0))

    kinds = {ALL: every, RANDOM: random, LARGEST: largest, RANKED: ranked, BAND: band}
    return kinds[len(c)]


@compiled(error_model="numpy")
def add_terms(
    out: Any,
    base: Any,
    sources: Any,
    ranks: Any,
    c: Any,
    factors: Any,
    divisor: Any,
    scale: Any,
    k0: Any,
    first: Any,
) -> Any:
    """Out = base + scale (Σ_i f_i kept(δ_i)) / divisor; see `task_vectors.add_task_vectors`.

    Args:
        out: Written, bfloat16 as uint16 or float32.
        base: Tensor of the base.
        sources: Tuple of N tensors, all of one type.
        ranks: Tuple of N uint16 arrays, or None when no term is ranked.
        c: Tuple of N tuples of constants.
        factors: Tuple of N numbers, rounded to float32 as all below.
        divisor: A number.
        scale: A number.
        k0: First key of the counter hash.
        first: Position of the first element, modulo 2^32.

    Returns:
        The largest bit pattern of an absolute result before rounding, uint32.
    """
    largest = _U(0)
    for e in range(out.shape[0]):
        mixed = _mixed(_U(_U(e) + first), k0)
        b = _load(base[e])
        total = _F(0)
        for i in range(len(sources)):
            rank = np.uint16(0) if ranks is None else ranks[i][e]
            kept = _kept(_F(_load(sources[i][e]) - b), mixed, rank, c[i])
            total = _F(total + _F(kept * _F(factors[i])))
        merged = _F(_F(_F(total / _F(divisor)) * _F(scale)) + b)
        largest = max(largest, _U(_bits(merged) & _U(0x7FFFFFFF)))
        out[e] = _rounded(merged, out[e])
    return largest


@compiled(error_model="numpy")
def elect_terms(
    out: Any,
    base: Any,
    sources: Any,
    ranks: Any,
    c: Any,
    factors: Any,
    weights: Any,
    scale: Any,
    k0: Any,
    first: Any,
) -> Any:
    """Add the terms whose sign is that of their sum; see `task_vectors.add_task_vectors`.

    The arguments are those of `add_terms`, but for `weights`: a tuple of N numbers whose sum over the terms
    that agree divides, or None not to divide.
    """
    # Sums start from -0.0, and what does not count adds -0.0, which changes no number: then adding under a
    # condition is one instruction, where 0.0 would need a second to choose what to add.
    largest = _U(0)
    for e in range(out.shape[0]):
        mixed = _mixed(_U(_U(e) + first), k0)
        b = _load(base[e])
        total = _F(-0.0)
        for i in range(len(sources)):
            rank = np.uint16(0) if ranks is None else ranks[i][e]
            kept = _kept(_F(_load(sources[i][e]) - b), mixed, rank, c[i])
            total = _F(total + _F(kept * _F(factors[i])))
        # Mirrored where the elected sign is negative, so that one sum serves both signs.
        mirror = _U(0) if total >= _F(0) else _U(0x80000000)
        flaw = _F(total - total)
        total, divisor = _F(-0.0), _F(-0.0)
        for i in range(len(sources)):
            rank = np.uint16(0) if ranks is None else ranks[i][e]
            kept = _kept(_F(_load(sources[i][e]) - b), mixed, rank, c[i])
            term = _float(_U(_bits(_F(kept * _F(factors[i]))) ^ mirror))
            agrees = term > _F(0)
            total = _F(total + (term if agrees else _F(-0.0)))
            if weights is not None:
                divisor = _F(divisor + (_F(weights[i]) if agrees else _F(-0.0)))
        if weights is not None:
            total = _F(total / (_F(1) if divisor == _F(0) else divisor))
        total = _F(_float(_U(_bits(total) ^ mirror)) + flaw)
        merged = _F(_F(total * _F(scale)) + b)
        largest = max(largest, _U(_bits(merged) & _U(0x7FFFFFFF)))
        out[e] = _rounded(merged, out[e])
    return largest


@compiled(error_model="numpy")
def combine(out: Any, sources: Any, coefficients: Any, divisor: Any) -> Any:
    """Out = (Σ_i c_i θ_i) / divisor, with one coefficient per source; returns as `add_terms` does."""
    largest = _U(0)
    for e in range(out.shape[0]):
        total = _F(0)
        for i in range(len(sources)):
            total = _F(total + _F(_load(sources[i][e]) * _F(coefficients[i])))
        merged = _F(total / _F(divisor))
        largest = max(largest, _U(_bits(merged) & _U(0x7FFFFFFF)))
        out[e] = _rounded(merged, out[e])
    return largest


@compiled(error_model="numpy")
def combine_along(
    out: Any, base: Any, sources: Any, coefficients: Any, divisor: Any, first: Any, length: Any, by_row: Any
) -> Any:
    """As `combine`, or around the base as `add_terms`, with coefficients for every row or column.

    Args:
        out: Written; the return value is that of `add_terms`.
        base: Tensor of the base, or None to combine the tensors themselves.
        sources: Tuple of N tensors.
        coefficients: float32 [R, N], or [C, N].
        divisor: A number.
        first: Position of the first element, int64.
        length: Number of columns.
        by_row: Whether a row shares coefficients, or a column.
    """
    largest = _U(0)
    for e in range(out.shape[0]):
        place = (first + e) // length if by_row else (first + e) % length
        b = _F(0) if base is None else _load(base[e])
        total = _F(0)
        for i in range(len(sources)):
            value = _load(sources[i][e])
            if base is not None:
                value = _F(value - b)
            total = _F(total + _F(value * coefficients[place, i]))
        merged = _F(total / _F(divisor))
        if base is not None:
            merged = _F(merged + b)
        largest = max(largest, _U(_bits(merged) & _U(0x7FFFFFFF)))
        out[e] = _rounded(merged, out[e])
    return largest


@compiled()
def count_magnitudes(table: Any, base: Any, source: Any) -> None:
    """Add the task vector source - base to a histogram of magnitudes.

    Sums are kept as integers, so that they do not depend on the order of the elements.

    Args:
        table: Per bin, the number of elements times 2^40, plus the sum of the bits below `BIN_SHIFT`;
            uint64 [NUM_BINS], changed. There is room for 2^24 elements.
        base: Tensor of the base.
        source: Tensor of the source.
    """
    for e in range(source.shape[0]):
        bits = _U(_bits(_F(_load(source[e]) - _load(base[e]))) & _U(0x7FFFFFFF))
        table[bits >> _U(BIN_SHIFT)] += np.uint64(1 << 40) + np.uint64(bits & _U((1 << BIN_SHIFT) - 1))


@compiled()
def take_occupied(bins: Any, counts: Any, sums: Any, table: Any) -> Any:
    """Move what `count_magnitudes` counted out of its table, which is zero again afterwards.

    Args:
        bins: The occupied bins, int64; written from its start.
        counts: Elements per bin, as `bins`.
        sums: Per bin, the sum of the bits below `BIN_SHIFT`, as `bins`.
        table: What was counted; changed.

    Returns:
        The number of occupied bins.
    """
    count = 0
    for place in range(table.shape[0]):
        found = table[place]
        if found != np.uint64(0):
            bins[count] = place
            counts[count] = np.int64(found >> np.uint64(40))
            sums[count] = np.int64(found & np.uint64((1 << 40) - 1))
            table[place] = 0
            count += 1
    return count


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _dot(a: Any, b: Any, base_a: Any, base_b: Any) -> Any:
    total = 0.0
    for e in range(a.shape[0]):
        x, y = np.float64(_load(a[e])), np.float64(_load(b[e]))
        if base_a is not None:
            x -= np.float64(_load(base_a[e]))
            y -= np.float64(_load(base_b[e]))
        total += x * y
    return total


@compiled()
def dots(out: Any, tensors: Any, base: Any) -> None:
    """Inner products of N tensors, or of their differences from the base, over one run of elements.

    Args:
        out: float64 [N, N]; written.
        tensors: Tuple of N tensors.
        base: Tensor of the base, or None for the tensors themselves.
    """
    for i in range(len(tensors)):
        for j in range(i, len(tensors)):
            out[i, j] = out[j, i] = _dot(tensors[i], tensors[j], base, base)
