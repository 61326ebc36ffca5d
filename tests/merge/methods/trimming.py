"""What is open where task vectors are trimmed: which of the elements in the bin at a threshold are kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merge.histogram import BIN_SHIFT

from .inputs import family


def bins(delta: Tensor) -> Tensor:
    """Bin of every magnitude, of the tensor's shape."""
    return delta.abs().contiguous().view(torch.int32) >> BIN_SHIFT


def at_ends(delta: Tensor, first: int, end: int) -> Tensor:
    """Mask of the elements in the bins of the magnitudes of ascending ranks `first` and `end - 1`."""
    where = bins(delta)
    ordered = where.flatten().sort().values
    # A bin that is kept or dropped as a whole leaves nothing open.
    ends = [ordered[first]] if first and ordered[first - 1] == ordered[first] else []
    ends += [ordered[end - 1]] if end < len(ordered) and ordered[end] == ordered[end - 1] else []
    found = torch.zeros_like(where, dtype=torch.bool)
    for place in ends:
        found |= where == place
    return found


def coarse(count: int = 50_000, seed: int = 0) -> Tensor:
    """The difference of two bfloat16 tensors: few distinct magnitudes, many of them 0."""
    base, other = family(count, count=1, seed=seed, change=0.005)
    return other.bfloat16().float() - base.bfloat16().float()


def assert_trimmed_alike(ours: Tensor, theirs: Tensor, delta: Tensor, first: int, end: int) -> None:
    """Two trimmed task vectors are equal but for the bins at both ends, of which they hold equally many.

    Which elements of a bin we keep is for the hash to say, so that their number is right up to four standard
    deviations: 0.2 % of what is kept of a million elements, unless that is little or nearly all in one bin.
    """
    is_open = at_ends(delta, first, end)
    assert ours[~is_open].equal(theirs[~is_open])
    assert bool(((ours == delta) | (ours == 0)).all())
    num_open = int(is_open.sum())
    if not num_open:
        assert ours.equal(theirs)
        return
    numbers = [int((tensor != 0).sum()) for tensor in (ours, theirs)]
    norms = [float(tensor.double().abs().sum()) for tensor in (ours, theirs)]
    deviation = math.sqrt(num_open) / 2
    largest = float(delta[is_open].abs().max())
    assert abs(numbers[0] - numbers[1]) <= 4 * deviation
    assert abs(norms[0] - norms[1]) <= (4 * deviation + num_open / 512) * largest
    if num_open < 0.001 * end:
        assert norms[0] == pytest.approx(norms[1], rel=0.002)
