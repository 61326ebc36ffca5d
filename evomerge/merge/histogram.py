"""Magnitude histograms of task vectors: which threshold keeps a given share, and what that leaves of a norm.

Magnitudes are binned by the high bits of their float32 pattern, 512 bins per octave, so a merge that trims
task vectors needs one pass for the histogram, once, and one pass per candidate, where sorting would need
the whole tensor sorted for every candidate. A threshold is exact to one bin; inside the bin at the boundary
the counter hash keeps as many elements as the share asks for. (Differences of bfloat16 weights are coarse:
one bin can hold a fifth of a tensor, all of one magnitude.)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor

BIN_SHIFT = 14
"""Bits of a float32 pattern below the bins: 9 of the 23 bits of the mantissa are left."""
NUM_BINS = 1 << (31 - BIN_SHIFT)


class Cut(NamedTuple):  # as Band, cheaper to make than a dataclass: a candidate takes thousands
    """One end of a band of magnitudes, compared with the bit pattern of an absolute float32 value.

    Attributes:
        inside: Bound for elements whose hash is at most `last`.
        outside: Bound for the others.
        last: Largest hash value for which `inside` counts.
    """

    inside: int
    outside: int
    last: int


class Band(NamedTuple):
    """A range of magnitudes to keep: low <= |δ| < high.

    Attributes:
        low: Its lower end.
        high: Its upper end, or None when nothing is too large.
        rescale: L1 norm before over L1 norm after; 1 when either is next to nothing.
    """

    low: Cut
    high: Cut | None
    rescale: float


@dataclass(frozen=True, eq=False)
class Histogram:
    """Magnitudes of one task vector.

    Attributes:
        table: float64 [3, B] for the B occupied bins, ascending: the bin, the number of elements up to and
            including it, and the sum of their magnitudes.
    """

    table: NDArray[np.float64]

    @classmethod
    def of(cls, delta: Tensor) -> Histogram:
        """The histogram of a task vector, float32 of any shape."""
        return cls.of_pieces([delta])

    @classmethod
    def of_pieces(cls, deltas: Iterable[Tensor]) -> Histogram:
        """The histogram of a task vector that comes in pieces, at least one."""
        import torch

        tables = None
        for delta in deltas:
            bits = delta.reshape(-1).contiguous().view(torch.int32) & 0x7FFFFFFF
            if tables is None:
                tables = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=bits.device)
            places = bits >> BIN_SHIFT
            tables[0] += torch.bincount(places, minlength=NUM_BINS)
            tables[1].index_add_(0, places, (bits & ((1 << BIN_SHIFT) - 1)).to(torch.int64))
        assert tables is not None
        counts, low_sums = tables.cpu().numpy()
        bins = np.flatnonzero(counts)
        return cls.from_counts(bins, counts[bins], low_sums[bins])

    @classmethod
    def from_counts(
        cls, bins: NDArray[np.int64], counts: NDArray[np.int64], low_sums: NDArray[np.int64]
    ) -> Histogram:
        """The histogram of what was counted.

        Args:
            bins: The B occupied bins, ascending.
            counts: Elements per bin, [B].
            low_sums: Per bin, the sum of the bits below `BIN_SHIFT`, [B].
        """
        bins = bins.astype(np.uint32)
        exponents = np.maximum(bins >> np.uint32(23 - BIN_SHIFT), 1).astype(np.int64)
        # Sums are not finite from the first magnitude on that is not.
        with np.errstate(over="ignore", invalid="ignore"):
            # Within a bin a magnitude is its smallest one plus `low bits` units in the last place.
            smallest = (bins << np.uint32(BIN_SHIFT)).view(np.float32).astype(np.float64)
            sums = np.cumsum(counts * smallest + low_sums * np.ldexp(1.0, exponents - 150))
        return cls(np.stack([bins.astype(np.float64), np.cumsum(counts).astype(np.float64), sums]))

    @cached_property
    def _rows(self) -> list[memoryview]:
        """The table's rows; numbers are taken out of these in half the time, a candidate takes thousands."""
        return [memoryview(row) for row in np.ascontiguousarray(self.table)]

    @property
    def num_elements(self) -> int:
        """Number of elements of the task vector."""
        return int(self._rows[1][-1]) if self.table.shape[1] else 0

    @property
    def norm(self) -> float:
        """Its L1 norm."""
        return float(self._rows[2][-1]) if self.table.shape[1] else 0.0

    def largest(self, count: int) -> Band:
        """The band of the `count` largest elements, at least 1 and at most all."""
        return self.band(self.num_elements - count, self.num_elements)

    def band(self, first: int, end: int) -> Band:
        """The band of the elements with ascending ranks first <= rank < end.

        Args:
            first: Number of smallest elements to leave out.
            end: Number of elements up to the largest one kept, above `first`.
        """
        bins, ends, sums = self._rows
        low, high = bisect_right(ends, first), bisect_left(ends, end)
        before_low = ends[low - 1] if low else 0.0
        share_low = (min(ends[low], end) - first) / (ends[low] - before_low)
        share_high = 1.0
        if high > low:
            before_high = ends[high - 1]
            share_high = (end - before_high) / (ends[high] - before_high)
        # The norm inside, the bins at the boundaries in proportion.
        norm = sums[-1]
        after = share_low * (sums[low] - (sums[low - 1] if low else 0.0))
        if high > low:
            after += sums[high] - sums[low] - (1 - share_high) * (sums[high] - sums[high - 1])
        known = norm >= TINY_NORM and after >= TINY_NORM
        return Band(
            low=_cut(bins[low], share_low, inside=0),
            high=None if end == ends[-1] else _cut(bins[high], share_high, inside=1),
            rescale=norm / after if known else 1.0,
        )


def _cut(number: float, share: float, *, inside: int) -> Cut:
    """The cut that keeps a share of a bin: its bounds are the bin's start (0) and end (1)."""
    start = int(number) << BIN_SHIFT
    end = start + (1 << BIN_SHIFT)
    kept = round(share * 2**32)
    if 0 < kept < 2**32:
        return Cut(end, start, kept - 1) if inside else Cut(start, end, kept - 1)
    bound = end if bool(kept) == bool(inside) else start
    return Cut(bound, bound, 0)


TINY_NORM = 1e-7
"""L1 norm below which a trimmed task vector is not rescaled, as in mergekit."""
