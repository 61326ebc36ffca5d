"""Magnitude histograms of task vectors: which threshold keeps a given share, and what that leaves of a norm.

Magnitudes are binned by the high bits of their float32 pattern, 512 bins per octave, so a merge that trims
task vectors needs one pass for the histogram, once, and one pass per candidate, where sorting would need
the whole tensor sorted for every candidate. A threshold is exact to one bin; inside the bin at the boundary
the counter hash keeps as many elements as the share asks for. (Differences of bfloat16 weights are coarse:
one bin can hold a fifth of a tensor, all of one magnitude.)

So every element has a sort key of 32 bits, and a threshold is a key:

    bin of its magnitude, 17 bits | tie number, 15 bits     see `counter_hash.tie_number`
"""

from __future__ import annotations

import math
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
TIES = 1 << (BIN_SHIFT + 1)
"""Number of different tie numbers."""
LAST_KEY = NUM_BINS * TIES - 1
"""The largest key."""


class Band(NamedTuple):  # cheaper to make than a dataclass: a candidate takes thousands
    """A range of magnitudes to keep, those of the elements with lowest <= key <= highest.

    Attributes:
        lowest: Smallest key, an int of 32 bits.
        highest: Largest key, at least `lowest`.
    """

    lowest: int
    highest: int = LAST_KEY


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

    @cached_property
    def num_elements(self) -> int:
        """Number of elements of the task vector."""
        return int(self.table[1, -1]) if self.table.shape[1] else 0

    @cached_property
    def norm(self) -> float:
        """Its L1 norm."""
        return float(self.table[2, -1]) if self.table.shape[1] else 0.0

    def largest(self, count: int) -> Band:
        """The band of the `count` largest elements, at least 1 and at most all."""
        return self.band(self.num_elements - count, self.num_elements)

    def band(self, first: int, end: int) -> Band:
        """The band of the elements with ascending ranks first <= rank < end.

        Args:
            first: Number of smallest elements to leave out.
            end: Number of elements up to the largest one kept, above `first`.
        """
        if not math.isfinite(self.norm):
            return Band(lowest=0)  # NaN and infinity do not vanish: they mean that a source is damaged
        lowest = self._key(first)
        if end == self.num_elements:
            return Band(lowest)
        return Band(lowest, max(lowest, self._key(end) - 1))

    def rescale(self, first: int, end: int) -> float:
        """L1 norm over that of the band of these ranks; 1 when either is next to nothing or not finite.

        Tie numbers keep a share of a bin to 1/32768 only, which shows where less than that is wanted of one.
        """
        after = self._norm_below(end) - self._norm_below(first)
        known = TINY_NORM <= after <= self.norm < math.inf
        return self.norm / after if known else 1.0

    def _key(self, rank: int) -> int:
        """The key that `rank` elements, fewer than all, lie below."""
        bins, ends, _ = self._rows
        place = bisect_right(ends, rank)
        start = ends[place - 1] if place else 0.0
        below = round((rank - start) / (ends[place] - start) * TIES)
        return int(bins[place]) * TIES + min(TIES - 1, below)

    def _norm_below(self, rank: int) -> float:
        """L1 norm of the `rank` smallest elements, those of one bin taken to be equal."""
        _, ends, sums = self._rows
        place = bisect_left(ends, rank)
        start, norm = (ends[place - 1], sums[place - 1]) if place else (0.0, 0.0)
        return float(norm + (rank - start) / (ends[place] - start) * (sums[place] - norm))


TINY_NORM = 1e-7
"""L1 norm below which a trimmed task vector is not rescaled, as in mergekit."""
