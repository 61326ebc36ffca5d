"""Operations in one pass over the sources, compiled for the CPU by numba.

Every source is read once and the result written once. The loops are free of branches, so that they are
compiled to vector instructions; bfloat16 is shifted into float32, and rounded to nearest even by hand. Nothing is
contracted or reordered: the results are those of `reference`, bit for bit, whatever the run of elements or the number
of threads.

Arrays come in three forms, which `_load` and `_store` tell apart by their type:

    float32    an element is a number
    uint16     an element is the bits of a bfloat16 number
    uint32     an element is a pair of them, the lower half first; position 2p is even

Pairs take half the instructions to load and to store, and share the hash of their tie numbers; see `counter_hash`.

Kernels are specialised by the types of their arguments: the number of sources and what is kept of a task
vector are told from tuples' lengths (`_kept`), so that compiled code can be cached between processes.

Shapes: every array is flat, [E] elements or [E / 2] pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

from evomerge.merge.histogram import BIN_SHIFT, TIES

_F, _U = np.float32, np.uint32

ALL, RANDOM, LARGEST, BAND, RANKED = 1, 2, 3, 4, 5
"""Length of a term's constants -> what is kept of its task vector; see `_scaled`."""


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


def _paired(array: Any) -> Any:
    """Whether the elements of an array are pairs."""
    raise NotImplementedError


@overload(_paired)
def _overload_paired(array: Any) -> Any:
    pairs = isinstance(array.dtype, types.Integer) and array.dtype.bitwidth == 32

    def paired(array: Any) -> Any:
        return pairs

    return paired


def _load(stored: Any, half: Any) -> Any:
    """A stored element as float32; of a pair its lower half (0) or its upper one (1)."""
    raise NotImplementedError


@overload(_load)
def _overload_load(stored: Any, half: Any) -> Any:
    def pair(stored: Any, half: Any) -> Any:
        return _float(_U(_U(stored << _U(16 - 16 * half)) & _U(0xFFFF0000)))

    def bfloat16(stored: Any, half: Any) -> Any:
        return _float(_U(_U(stored) << _U(16)))

    def float32(stored: Any, half: Any) -> Any:
        return stored

    if not isinstance(stored, types.Integer):
        return float32
    return bfloat16 if stored.bitwidth == 16 else pair


def _rank(stored: Any, half: Any) -> Any:
    """A rank, stored as elements are."""
    raise NotImplementedError


@overload(_rank)
def _overload_rank(stored: Any, half: Any) -> Any:
    def pair(stored: Any, half: Any) -> Any:
        return _U(_U(stored >> _U(16 * half)) & _U(0xFFFF))

    def single(stored: Any, half: Any) -> Any:
        return _U(stored)

    return pair if stored.bitwidth == 32 else single


@register_jitable
def _rounded(value: Any) -> Any:
    """The pattern of a float32 number whose upper half is the bfloat16 number next to it."""
    q = _bits(value)
    return _U(q + _U(_U(0x7FFF) + _U(_U(q >> _U(16)) & _U(1))))


def _store(out: Any, e: Any, low: Any, high: Any) -> None:
    """Round and store an element, or both halves of a pair."""
    raise NotImplementedError


@overload(_store)
def _overload_store(out: Any, e: Any, low: Any, high: Any) -> Any:
    def pair(out: Any, e: Any, low: Any, high: Any) -> None:
        out[e] = _U(_U(_rounded(high) & _U(0xFFFF0000)) | _U(_rounded(low) >> _U(16)))

    def bfloat16(out: Any, e: Any, low: Any, high: Any) -> None:
        out[e] = np.uint16(_rounded(low) >> _U(16))

    def float32(out: Any, e: Any, low: Any, high: Any) -> None:
        out[e] = low

    if not isinstance(out.dtype, types.Integer):
        return float32
    return bfloat16 if out.dtype.bitwidth == 16 else pair


@register_jitable
def _magnitude(low: Any, high: Any) -> Any:
    """The larger bit pattern of two absolute float32 numbers."""
    return max(_U(_bits(low) & _U(0x7FFFFFFF)), _U(_bits(high) & _U(0x7FFFFFFF)))


@register_jitable
def _key(delta: Any, position: Any, k0: Any, k1: Any) -> Any:
    """An element's sort key; see `histogram`. Of both elements of a pair the hash is the same, and computed once."""
    h = _hash(_mixed(_U(position & _U(0xFFFFFFFE)), k0), k1)
    odd = _U(h >> _U(17))
    tie = odd if _U(position & _U(1)) != _U(0) else _U(_U(h ^ odd) & _U(TIES - 1))
    return _U(_U(_U(_bits(delta) << _U(1)) & _U(2**32 - TIES)) | tie)


def _scaled(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
    """One element of a task vector times its factor, or zero where it is not kept.

    Args:
        delta: The element, float32.
        factor: The factor, float32.
        position: Its position modulo 2^32.
        k0: First key of the counter hash.
        rank: Its rank within its row, for ranked terms.
        c: The term's constants; see `cpu_arrays.constants`.
    """
    raise NotImplementedError


@overload(_scaled)
def _overload_scaled(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
    def every(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
        return _F(delta * factor)

    def random(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
        last, k1 = c
        return _F((delta if _hash(_mixed(position, k0), _U(k1)) <= _U(last) else _F(delta * _F(0))) * factor)

    def largest(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
        lowest, _, k1 = c
        return _F(delta * factor) if _key(delta, position, k0, _U(k1)) >= _U(lowest) else _F(0)

    def band(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
        lowest, span, _, k1 = c
        return _F(delta * factor) if _U(_key(delta, position, k0, _U(k1)) - _U(lowest)) <= _U(span) else _F(0)

    def ranked(delta: Any, factor: Any, position: Any, k0: Any, rank: Any, c: Any) -> Any:
        lowest, step, rescaled, _, k1 = c
        p = _F(_float(lowest) + _F(_F(np.int32(rank)) * _float(step)))
        uniform = _F(_F(np.int32(_hash(_mixed(position, k0), _U(k1)) >> _U(8))) * _F(2.0**-24))
        kept = _F(delta / (p if rescaled != 0 else _F(1))) if uniform < p else _F(delta * _F(0))
        return _F(kept * factor)

    kinds = {ALL: every, RANDOM: random, LARGEST: largest, BAND: band, RANKED: ranked}
    return kinds[len(c)]


@register_jitable
def _term(
    i: Any, e: Any, half: Any, b: Any, sources: Any, ranks: Any, c: Any, factors: Any, k0: Any, position: Any
) -> Any:
    """Source i's part of a sum of task vectors, at one element."""
    rank = _U(0) if ranks is None else _rank(ranks[i][e], half)
    delta = _F(_load(sources[i][e], half) - b)
    return _scaled(delta, _F(factors[i]), position, k0, rank, c[i])


@register_jitable
def _added(
    e: Any,
    half: Any,
    base: Any,
    sources: Any,
    ranks: Any,
    c: Any,
    factors: Any,
    weights: Any,
    divisor: Any,
    scale: Any,
    k0: Any,
    position: Any,
) -> Any:
    """One element of `add_terms`."""
    b = _load(base[e], half)
    total = _F(0)
    for i in range(len(sources)):
        total = _F(total + _term(i, e, half, b, sources, ranks, c, factors, k0, position))
    if weights is None:
        if divisor is not None:
            total = _F(total / _F(divisor))
    else:
        # Mirrored where the elected sign is negative, so that one sum serves both signs. What does not count adds
        # -0.0, which changes no number: then adding under a condition is one instruction, where 0.0 would need a
        # second to choose what to add.
        mirror = _U(_bits(total) & _U(0x80000000))
        total, agreed = _F(0), _F(0)
        for i in range(len(sources)):
            term = _term(i, e, half, b, sources, ranks, c, factors, k0, position)
            term = _float(_U(_bits(term) ^ mirror))
            agrees = not (term <= _F(0))  # NaN, which has no sign, has its say
            total = _F(total + (term if agrees else _F(-0.0)))
            if divisor is not None:
                agreed = _F(agreed + (_F(weights[i]) if agrees else _F(-0.0)))
        if divisor is not None:
            total = _F(total / (_F(1) if agreed == _F(0) else agreed))
        total = _float(_U(_bits(total) ^ mirror))
    return _F(_F(total * _F(scale)) + b)


@compiled(error_model="numpy")
def add_terms(
    out: Any,
    base: Any,
    sources: Any,
    ranks: Any,
    c: Any,
    factors: Any,
    weights: Any,
    divisor: Any,
    scale: Any,
    k0: Any,
    first: Any,
) -> Any:
    """Out = base + scale (Σ_i f_i kept(δ_i)) / divisor; see `task_vectors.add_task_vectors`.

    Args:
        out: Written.
        base: Tensor of the base.
        sources: Tuple of N tensors, all of one type.
        ranks: Tuple of N arrays of ranks, uint16 or pairs as the tensors, or None when no term is ranked.
        c: Tuple of N tuples of constants.
        factors: Tuple of N numbers, rounded to float32 as all below.
        weights: Tuple of N weights to add only the terms whose sign is that of their sum, or None to add all.
        divisor: A number, or None not to divide; with weights, those of the terms that are added divide instead.
        scale: A number.
        k0: First key of the counter hash.
        first: Position of the first element, modulo 2^32; even where elements come in pairs.

    Returns:
        The largest bit pattern of an absolute result before rounding, uint32.
    """
    largest = _U(0)
    for e in range(out.shape[0]):
        if _paired(out):
            p = _U(_U(_U(e) << _U(1)) + _U(first & _U(0xFFFFFFFE)))  # seen to be even
            low = _added(e, 0, base, sources, ranks, c, factors, weights, divisor, scale, k0, p)
            high = _added(e, 1, base, sources, ranks, c, factors, weights, divisor, scale, k0, _U(p | _U(1)))
        else:
            p = _U(_U(e) + first)
            low = high = _added(e, 0, base, sources, ranks, c, factors, weights, divisor, scale, k0, p)
        largest = max(largest, _magnitude(low, high))
        _store(out, e, low, high)
    return largest


@register_jitable
def _combined(e: Any, half: Any, sources: Any, coefficients: Any, divisor: Any) -> Any:
    """One element of `combine`."""
    total = _F(0)
    for i in range(len(sources)):
        total = _F(total + _F(_load(sources[i][e], half) * _F(coefficients[i])))
    return total if divisor is None else _F(total / _F(divisor))


@compiled(error_model="numpy")
def combine(out: Any, sources: Any, coefficients: Any, divisor: Any) -> Any:
    """Out = (Σ_i c_i θ_i) / divisor, with one coefficient per source; arguments and result as of `add_terms`."""
    largest = _U(0)
    for e in range(out.shape[0]):
        low = high = _combined(e, 0, sources, coefficients, divisor)
        if _paired(out):
            high = _combined(e, 1, sources, coefficients, divisor)
        largest = max(largest, _magnitude(low, high))
        _store(out, e, low, high)
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
        b = _F(0) if base is None else _load(base[e], 0)
        total = _F(0)
        for i in range(len(sources)):
            value = _load(sources[i][e], 0)
            if base is not None:
                value = _F(value - b)
            total = _F(total + _F(value * coefficients[place, i]))
        merged = _F(total / _F(divisor))
        if base is not None:
            merged = _F(merged + b)
        largest = max(largest, _magnitude(merged, merged))
        _store(out, e, merged, merged)
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
        bits = _U(_bits(_F(_load(source[e], 0) - _load(base[e], 0))) & _U(0x7FFFFFFF))
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
        x, y = np.float64(_load(a[e], 0)), np.float64(_load(b[e], 0))
        if base_a is not None:
            x -= np.float64(_load(base_a[e], 0))
            y -= np.float64(_load(base_b[e], 0))
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
