"""Magnitude histograms answer what sorting would: thresholds, bands and norms, exact to one bin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge.counter_hash import hash_elements, keys
from evomerge.merge.histogram import BIN_SHIFT, NUM_BINS, Band, Cut, Histogram


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def coarse(count: int, seed: int = 0) -> Tensor:
    """The difference of two bfloat16 tensors: few distinct magnitudes, many of them 0."""
    base = normal(count, seed)
    return (base + 0.005 * normal(count, seed + 1)).bfloat16().float() - base.bfloat16().float()


def wide(count: int) -> Tensor:
    """Magnitudes over all octaves, subnormal ones included."""
    bits = torch.arange(count) * (0x7F7FFFFF // count) + 1
    return torch.where(torch.arange(count) % 3 == 0, -1.0, 1.0) * bits.to(torch.int32).view(torch.float32)


TENSORS = {
    "continuous": normal(5000),
    "coarse": coarse(5000),
    "wide": wide(5000),
    "one element": torch.tensor([-0.3]),
    "a scalar": torch.tensor(0.3),
    "equal": torch.full((3, 7), -1.25),
    "zero": torch.zeros(11),
    "signed zeros and one": torch.tensor([-0.0, 0.0, 2.0, -0.0]),
    "subnormal": normal(300).mul(1e-39),
    "the smallest": torch.full((5,), 1e-45),
    "huge": normal(300).clamp(-3, 3).mul(1e38),
    "a matrix": normal(600).view(20, 30),
    "strided": normal(600).view(20, 30).T,
}


def magnitudes(delta: Tensor) -> NDArray[np.float64]:
    """Ascending."""
    return np.sort(delta.abs().double().flatten().numpy())


def bits_of(delta: Tensor) -> NDArray[np.int64]:
    return delta.flatten().abs().contiguous().view(torch.int32).long().numpy()


def chances(band: Band, delta: Tensor) -> NDArray[np.float64]:
    """Chance of every element to lie in the band, over the hash."""
    bits = bits_of(delta)

    def reaches(cut: Cut) -> NDArray[np.float64]:
        share = (cut.last + 1) / 2**32
        return share * (bits >= cut.inside) + (1 - share) * (bits >= cut.outside)

    below = 1.0 if band.high is None else 1 - reaches(band.high)
    return reaches(band.low) * below


def check_band(delta: Tensor, first: int, end: int) -> None:
    """The band holds the ranks from `first` to `end`, up to the bins at both ends, and as many in expectation."""
    band = Histogram.of(delta).band(first, end)
    kept = chances(band, delta)
    count = len(kept)
    assert kept.sum() == pytest.approx(end - first, abs=2 * count * 2.0**-32 + 1e-9)
    order = np.argsort(bits_of(delta), kind="stable")
    places = bits_of(delta)[order] >> BIN_SHIFT
    inside = (places > places[first]) & (places < places[end - 1])
    np.testing.assert_array_equal(kept[order][inside], 1.0)
    outside = (places < places[first]) | (places > places[end - 1])
    np.testing.assert_array_equal(kept[order][outside], 0.0)
    after = math.fsum(kept * delta.flatten().abs().double().numpy())
    norm = math.fsum(magnitudes(delta))
    # Next to the bound either answer will do: sums are rounded.
    if after > 2e-7:
        assert band.rescale == pytest.approx(norm / after, rel=1e-6)
    elif after < 5e-8:
        assert band.rescale == 1.0


@pytest.mark.parametrize("name", TENSORS)
def test_bins_hold_counts_and_sums_of_magnitudes(name: str) -> None:
    delta = TENSORS[name]
    table = Histogram.of(delta).table
    bits = np.sort(bits_of(delta))
    bins, firsts = np.unique(bits >> BIN_SHIFT, return_index=True)
    ends = np.append(firsts[1:], len(bits))
    assert table.dtype == np.float64
    np.testing.assert_array_equal(table[0], bins)
    np.testing.assert_array_equal(table[1], ends)
    sums = np.cumsum(magnitudes(delta).astype(np.longdouble))[ends - 1]
    np.testing.assert_allclose(table[2], sums.astype(np.float64), rtol=1e-13)


@pytest.mark.parametrize("name", TENSORS)
def test_counts_and_norms_are_those_of_the_whole_tensor(name: str) -> None:
    delta = TENSORS[name]
    histogram = Histogram.of(delta)
    assert histogram.num_elements == delta.numel()
    assert histogram.norm == pytest.approx(math.fsum(magnitudes(delta)), rel=1e-13)


def test_an_octave_has_512_bins() -> None:
    steps = torch.arange(1 << 12).div(1 << 12).add(1)  # 1 <= x < 2
    assert Histogram.of(steps).table.shape[1] == 512
    assert Histogram.of(steps * 4).table.shape[1] == 512
    assert NUM_BINS == 256 * 512


def test_an_empty_tensor_has_no_bins() -> None:
    histogram = Histogram.of(torch.zeros(0, 3))
    assert histogram.table.shape == (3, 0)
    assert (histogram.num_elements, histogram.norm) == (0, 0.0)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.2, 0.5, 0.77, 0.999, 1.0])
def test_the_largest_are_those_that_sorting_finds(name: str, share: float) -> None:
    delta = TENSORS[name]
    count = max(1, int(share * delta.numel()))
    check_band(delta, delta.numel() - count, delta.numel())
    band = Histogram.of(delta).largest(count)
    assert band.high is None
    # The threshold lies in the bin of the smallest element kept.
    place = int(np.sort(bits_of(delta))[-count]) >> BIN_SHIFT
    assert {band.low.inside, band.low.outside} <= {place << BIN_SHIFT, (place + 1) << BIN_SHIFT}
    assert band.low.inside <= band.low.outside


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("ends", [(0, 1), (0.0, 0.5), (0.1, 0.9), (0.3, 0.31), (0.4995, 0.5), (0.7, 1)])
def test_bands_are_those_that_sorting_finds(name: str, ends: tuple[float, float]) -> None:
    count = TENSORS[name].numel()
    first = min(count - 1, int(ends[0] * count))
    check_band(TENSORS[name], first, max(first + 1, int(ends[1] * count)))


magnitude = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0009765625, 1e-45, 3.4028234663852886e38]),
)


@given(st.lists(magnitude, min_size=1, max_size=30), st.data())
def test_any_band_of_any_tensor(values: list[float], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values) - 1))
    end = data.draw(st.integers(first + 1, len(values)))
    check_band(torch.tensor(values, dtype=torch.float32), first, end)


def test_the_whole_is_one_band() -> None:
    for delta in TENSORS.values():
        band = Histogram.of(delta).band(0, delta.numel())
        np.testing.assert_array_equal(chances(band, delta), 1.0)
        assert band.rescale == 1.0


@pytest.mark.parametrize("first", [0, 100, 1000])
@pytest.mark.parametrize("kept", [400, 1000, 2500])
def test_within_a_bin_the_hash_keeps_as_many_as_are_asked_for(first: int, kept: int) -> None:
    """All elements are of one magnitude, so both ends of the band fall into its bin."""
    count = 1 << 16
    band = Histogram.of(torch.ones(count)).band(16 * first, 16 * (first + kept))
    hashes = hash_elements(torch.arange(count), *keys(0, "w", 1))
    bits = int(bits_of(torch.ones(1))[0])

    def reaches(cut: Cut) -> Tensor:
        return bits >= torch.where(hashes <= cut.last, cut.inside, cut.outside)

    assert band.high is not None
    found = int((reaches(band.low) & ~reaches(band.high)).sum())
    share = 16 * kept / count
    assert abs(found - 16 * kept) < 4 * math.sqrt(count * share * (1 - share))


def test_rescaling_makes_up_for_the_norm_that_was_trimmed() -> None:
    delta = torch.tensor([4.0, -3.0, 2.0, 1.0])
    assert Histogram.of(delta).largest(2).rescale == pytest.approx(10 / 7)
    assert Histogram.of(delta).band(1, 3).rescale == pytest.approx(10 / 5)


def test_next_to_nothing_is_not_rescaled() -> None:
    assert Histogram.of(torch.zeros(4)).largest(1).rescale == 1.0
    assert Histogram.of(torch.tensor([5e-9, 1e-8, 2e-8])).largest(1).rescale == 1.0
    assert Histogram.of(torch.tensor([1.0, 0.0, 0.0])).band(0, 1).rescale == 1.0
    assert Histogram.of(torch.tensor([5e-6, 1e-6])).largest(1).rescale == pytest.approx(6 / 5)


NOT_FINITE = [math.nan, -math.nan, math.inf, -math.inf]
# A signalling NaN, and those with the largest and the smallest pattern.
NOT_FINITE += [float(np.uint32(bits).view(np.float32)) for bits in (0x7FFFFFFF, 0xFFFFFFFF)]


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("number", [1, 3, 10])
def test_what_is_not_finite_is_largest_and_no_trouble(bad: float, number: int) -> None:
    delta = normal(10)
    delta[:number] = bad
    histogram = Histogram.of(delta)
    assert histogram.num_elements == 10
    assert not math.isfinite(histogram.norm)
    for first, end in ((0, 1), (0, 9), (2, 4), (6, 8), (9, 10), (0, 10)):
        kept = chances(histogram.band(first, end), delta)
        assert kept.sum() == pytest.approx(end - first)
        if end > 10 - number:
            assert kept[:number].sum() > 0


@pytest.mark.parametrize("bits", [0x7F800001, 0x7F804000, 0xFF800001, 0x7FFFFFFF, 0x7FC00000])
def test_any_pattern_of_nan_is_counted(bits: int) -> None:
    delta = torch.from_numpy(np.array([0x3F800000, bits], dtype=np.uint32).view(np.float32))
    histogram = Histogram.of(delta)
    np.testing.assert_array_equal(
        histogram.table[0], [0x3F800000 >> BIN_SHIFT, (bits & 0x7FFFFFFF) >> BIN_SHIFT]
    )
    np.testing.assert_array_equal(histogram.table[1], [1, 2])
    assert histogram.largest(1).low.inside == histogram.table[0, 1] * 2**BIN_SHIFT


@pytest.mark.parametrize("number", [1, 3, 7])
def test_cuts_count_hash_values_from_0(number: int) -> None:
    """The hash takes 2^32 values; k of n elements of a bin are those of the k / n smallest."""
    band = Histogram.of(torch.ones(8)).largest(number)
    assert band.low.last + 1 == number * 2**32 // 8
    band = Histogram.of(torch.tensor([0.5, *[1.0] * 8, 2.0])).band(0, 1 + number)
    assert band.high is not None
    assert band.high.last + 1 == number * 2**32 // 8
    assert band.high.inside > band.high.outside


def test_a_share_of_a_bin_below_the_hash_keeps_nothing_of_it() -> None:
    """As only tensors of more than 2^32 elements ask for."""
    bins = np.array([100.0, 200.0])
    histogram = Histogram(np.stack([bins, [2.0**34, 2.0**35], [1e9, 2e9]]))
    band = histogram.band(2**34 - 1, 2**34 + 1)
    assert (band.low.inside, band.low.outside) == (101 << BIN_SHIFT, 101 << BIN_SHIFT)
    assert band.high is not None
    assert (band.high.inside, band.high.outside) == (200 << BIN_SHIFT, 200 << BIN_SHIFT)
