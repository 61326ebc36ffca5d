"""Operations in one pass over the sources, compiled by Triton for NVIDIA and AMD GPUs.

Every source is read once and the result written once. Arithmetic is float32 in the order of `reference`, with
exact division and, by the options they are launched with, nothing contracted; bfloat16 is converted by hand, so
that the interpreter, whose own conversions truncate and misread subnormal numbers, gives what a GPU gives.

Numbers that change from candidate to candidate come in one int64 table rather than as arguments, whose values
would have kernels compiled anew:

    FLAG                  written: 1 once a result is not finite in the output's type
    LIMIT                 smallest float32 pattern that is not finite in it
    DIVISOR, SCALE        float32 patterns
    KEY                   first key of the counter hash
    FIRST                 position of the first element: modulo 2^32, or the whole of it in `combine`
    LENGTH                number of columns
    TERMS ...             per term its constants (see `cpu_arrays.constants`), then its factor and weight, float32
                          patterns; in `combine` its coefficient

Shapes: every tensor is flat, [E] elements, and shares them out to programs of BLOCK.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evomerge.merge import histogram

FLAG, LIMIT, DIVISOR, SCALE, KEY, FIRST, LENGTH, TERMS = (tl.constexpr(place) for place in range(8))

ALL, RANDOM, LARGEST, BAND, RANKED = (tl.constexpr(number) for number in (1, 2, 3, 4, 5))
"""Number of a term's constants -> what is kept of its task vector; see `_scaled`."""
BIN_SHIFT, TIES = tl.constexpr(histogram.BIN_SHIFT), tl.constexpr(histogram.TIES)


@triton.jit
def _number(table: tl.tensor, place: tl.tensor) -> tl.tensor:
    """A uint32 of the table."""
    return tl.load(table + place).to(tl.uint32)


@triton.jit
def _float(table: tl.tensor, place: tl.tensor) -> tl.tensor:
    """A float32 of the table."""
    return _number(table, place).to(tl.float32, bitcast=True)


@triton.jit
def _loaded(stored: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Elements as float32; 0 for those that are not inside."""
    value = tl.load(stored, mask=inside, other=0.0)
    if stored.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (bits << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _magnitude(value: tl.tensor) -> tl.tensor:
    """The bit pattern of an absolute float32, uint32."""
    return value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _mixed(position: tl.tensor, k0: tl.tensor) -> tl.tensor:
    """The first half of `counter_hash.hash_element`, the same for every source."""
    x = position ^ k0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return x ^ (x >> 15)


@triton.jit
def _hash(mixed: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """Its second half."""
    x = (mixed ^ k1) * 0x846CA68B
    return (x ^ (x >> 16)) * 0x9E3779B1


@triton.jit
def _scaled(
    delta: tl.tensor, position: tl.tensor, rank: tl.tensor, table: tl.tensor, c: tl.tensor, keep: tl.constexpr
) -> tl.tensor:
    """What is left of elements of a task vector, times their factor.

    Args:
        delta: The elements, float32.
        position: Their positions in the tensor, modulo 2^32.
        rank: Their ranks within their rows, for ranked terms.
        table: The table of numbers.
        c: Place of the term's constants in it, which its factor follows.
        keep: What to keep.
    """
    factor = _float(table, c + keep)
    if keep == ALL:
        return delta * factor
    k0, k1 = _number(table, KEY), _number(table, c + keep - 1)
    if keep == LARGEST or keep == BAND:  # noqa: SIM109 - Triton knows no other way
        h = _hash(_mixed(position & 0xFFFFFFFE, k0), k1)
        tie = tl.where((position & 1) != 0, h >> 17, (h ^ (h >> 17)) & (TIES - 1))
        key = (_magnitude(delta) >> BIN_SHIFT) * TIES + tie
        lowest = _number(table, c)
        kept = key >= lowest if keep == LARGEST else key - lowest <= _number(table, c + 1)
        return tl.where(kept, delta * factor, 0.0)
    h = _hash(_mixed(position, k0), k1)
    dropped = delta * 0.0
    if keep == RANDOM:
        kept = h <= _number(table, c)
    else:
        chance = _float(table, c) + rank.to(tl.float32) * _float(table, c + 1)
        kept = (h >> 8).to(tl.float32) * (2.0**-24) < chance
        delta = tl.div_rn(delta, tl.where(_number(table, c + 2) != 0, chance, 1.0))
    return tl.where(kept, delta, dropped) * factor


@triton.jit
def _store(out: tl.tensor, value: tl.tensor, inside: tl.tensor, table: tl.tensor) -> None:
    """Round and store results, and raise the flag if one is not finite in the output's type."""
    bits = value.to(tl.uint32, bitcast=True)
    if out.dtype.element_ty == tl.bfloat16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(out, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out, value.to(out.dtype.element_ty), mask=inside)
    # Below 2^31, hence the same as a signed number.
    largest = tl.max(tl.where(inside, (bits & 0x7FFFFFFF).to(tl.int32), 0), axis=0)
    # All programs that write write the same.
    tl.store(table + FLAG, 1, mask=largest >= tl.load(table + LIMIT))


@triton.jit
def add_terms(
    out: tl.tensor,
    base: tl.tensor,
    sources: tl.tuple,
    ranks: tl.tuple,
    table: tl.tensor,
    count: tl.tensor,
    keep: tl.constexpr,
    elect: tl.constexpr,
    normalize: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Out = base + scale (Σ_i f_i kept(δ_i)) / divisor; see `task_vectors.add_task_vectors`.

    Args:
        out: Written.
        base: Tensor of the base.
        sources: Tuple of N tensors.
        ranks: Tuple of N uint16 tensors, or None when no term is ranked.
        table: Numbers; see above.
        count: Number of elements.
        keep: What is kept of task vectors.
        elect: Add only the terms whose sign is that of their sum.
        normalize: When electing, divide by the sum of the weights of the terms that are added.
        block: Elements per program.
    """
    e = tl.program_id(0) * block + tl.arange(0, block)
    inside = e < count
    b = _loaded(base + e, inside)
    position = e.to(tl.uint32) + _number(table, FIRST)
    total = tl.zeros([block], tl.float32)
    # When electing, the sums of both signs are kept until it is known which one counts.
    above, above_weight = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    below, below_weight = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    for i in tl.static_range(len(sources)):
        c = TERMS + i * (keep + 2)
        delta = _loaded(sources[i] + e, inside) - b
        rank = e if ranks is None else tl.load(ranks[i] + e, mask=inside, other=0)
        term = _scaled(delta, position, rank, table, c, keep)
        total += term
        if elect:
            # NaN, which has no sign, has its say.
            above += tl.where(term <= 0, 0.0, term)
            below += tl.where(term >= 0, 0.0, term)
        if normalize:
            weight = _float(table, c + keep + 1)
            above_weight += tl.where(term <= 0, 0.0, weight)
            below_weight += tl.where(term >= 0, 0.0, weight)
    divisor = _float(table, DIVISOR)
    if elect:
        positive = total >= 0
        total = tl.where(positive, above, below)
        if normalize:
            weight = tl.where(positive, above_weight, below_weight)
            total = tl.div_rn(total, tl.where(weight == 0, 1.0, weight))
    else:
        total = tl.div_rn(total, divisor)
    _store(out + e, total * _float(table, SCALE) + b, inside, table)


@triton.jit
def combine(
    out: tl.tensor,
    base: tl.tensor,
    sources: tl.tuple,
    coefficients: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    by_row: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Out = (Σ_i c_i θ_i) / divisor, or around the base, with coefficients for the whole, a row or a column.

    Args:
        out: Written.
        base: Tensor of the base, or None to combine the tensors themselves.
        sources: Tuple of N tensors.
        coefficients: float32 [R, N] or [C, N], or None for those in the table.
        table: Numbers; see above.
        count: Number of elements.
        by_row: Whether a row shares coefficients, or a column.
        block: Elements per program.
    """
    e = tl.program_id(0) * block + tl.arange(0, block)
    inside = e < count
    if base is not None:
        b = _loaded(base + e, inside)
    if coefficients is not None:
        position, length = e + tl.load(table + FIRST), tl.load(table + LENGTH)
        line = position // length if by_row else position % length
    total = tl.zeros([block], tl.float32)
    for i in tl.static_range(len(sources)):
        value = _loaded(sources[i] + e, inside)
        if base is not None:
            value -= b
        if coefficients is None:
            total += value * _float(table, TERMS + i)
        else:
            total += value * tl.load(coefficients + line * len(sources) + i, mask=inside, other=0.0)
    total = tl.div_rn(total, _float(table, DIVISOR))
    if base is not None:
        total += b
    _store(out + e, total, inside, table)
