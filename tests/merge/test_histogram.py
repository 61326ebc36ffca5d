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

from evomerge.merge.counter_hash import keys, tie_numbers
from evomerge.merge.histogram import BIN_SHIFT, LAST_KEY, NUM_BINS, TIES, Band, Histogram


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
    """Chance of every element to lie in the band, over its tie number."""
    start = (bits_of(delta) >> BIN_SHIFT) * TIES
    inside = np.minimum(start + TIES, band.highest + 1) - np.maximum(start, band.lowest)
    return np.maximum(0, inside) / TIES


def check_band(delta: Tensor, first: int, end: int) -> None:
    """The band holds the ranks from `first` to `end`, up to the bins at both ends, and as many in expectation."""
    histogram = Histogram.of(delta)
    kept, rescale = chances(histogram.band(first, end), delta), histogram.rescale(first, end)
    count = len(kept)
    assert kept.sum() == pytest.approx(end - first, abs=2 * count / TIES)
    order = np.argsort(bits_of(delta), kind="stable")
    places = bits_of(delta)[order] >> BIN_SHIFT
    inside = (places > places[first]) & (places < places[end - 1])
    np.testing.assert_array_equal(kept[order][inside], 1.0)
    outside = (places < places[first]) | (places > places[end - 1])
    np.testing.assert_array_equal(kept[order][outside], 0.0)
    after = math.fsum(kept * delta.flatten().abs().double().numpy())
    norm = math.fsum(magnitudes(delta))
    # Next to the bound either answer will do: sums are rounded, and shares of a bin more so.
    if after > 2e-7:
        coarse = 2 * count / TIES * float(magnitudes(delta)[end - 1])
        assert norm / rescale == pytest.approx(after, rel=1e-6, abs=coarse)
    elif after < 5e-8:
        assert rescale == 1.0


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
    assert band.highest == LAST_KEY
    # The threshold lies in the bin of the smallest element kept.
    assert band.lowest // TIES == int(np.sort(bits_of(delta))[-count]) >> BIN_SHIFT


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
        histogram, count = Histogram.of(delta), delta.numel()
        np.testing.assert_array_equal(chances(histogram.band(0, count), delta), 1.0)
        assert histogram.rescale(0, count) == 1.0


@pytest.mark.parametrize("first", [0, 100, 1000])
@pytest.mark.parametrize("kept", [400, 1000, 2500])
def test_within_a_bin_tie_numbers_keep_as_many_as_are_asked_for(first: int, kept: int) -> None:
    """All elements are of one magnitude, so both ends of the band fall into its bin."""
    count = 1 << 16
    band = Histogram.of(torch.ones(count)).band(16 * first, 16 * (first + kept))
    key = (int(bits_of(torch.ones(1))[0]) >> BIN_SHIFT) * TIES + tie_numbers(
        torch.arange(count), *keys(0, "w", 1)
    )
    found = int(((band.lowest <= key) & (key <= band.highest)).sum())
    share = 16 * kept / count
    assert abs(found - 16 * kept) < 4 * math.sqrt(count * share * (1 - share))


def test_rescaling_makes_up_for_the_norm_that_was_trimmed() -> None:
    histogram = Histogram.of(torch.tensor([4.0, -3.0, 2.0, 1.0]))
    assert histogram.rescale(2, 4) == pytest.approx(10 / 7)
    assert histogram.rescale(1, 3) == pytest.approx(10 / 5)


@pytest.mark.parametrize(
    ("values", "ranks", "expected"),
    [
        ([0.0] * 4, (3, 4), 1.0),
        ([5e-9, 1e-8, 2e-8], (2, 3), 1.0),
        ([1.0, 0.0, 0.0], (0, 1), 1.0),
        ([5e-6, 1e-6], (1, 2), 6 / 5),
        ([1.0, math.inf], (0, 1), 1.0),
        ([1.0, math.nan], (1, 2), 1.0),
    ],
)
def test_next_to_nothing_and_what_is_not_finite_are_not_rescaled(
    values: list[float], ranks: tuple[int, int], expected: float
) -> None:
    assert Histogram.of(torch.tensor(values)).rescale(*ranks) == pytest.approx(expected)


NOT_FINITE = [math.nan, -math.nan, math.inf, -math.inf]
# A signalling NaN, and those with the largest and the smallest pattern.
NOT_FINITE += [float(np.uint32(bits).view(np.float32)) for bits in (0x7FFFFFFF, 0xFFFFFFFF)]


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("number", [1, 3, 10])
def test_nothing_is_trimmed_from_what_is_not_finite(bad: float, number: int) -> None:
    """So that the merged tensor shows it."""
    delta = normal(10)
    delta[:number] = bad
    histogram = Histogram.of(delta)
    assert histogram.num_elements == 10
    assert not math.isfinite(histogram.norm)
    for first, end in ((0, 1), (0, 9), (2, 4), (6, 8), (9, 10), (0, 10)):
        np.testing.assert_array_equal(chances(histogram.band(first, end), delta), 1.0)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7F804000, 0xFF800001, 0x7FFFFFFF, 0x7FC00000])
def test_any_pattern_of_nan_is_counted(bits: int) -> None:
    delta = torch.from_numpy(np.array([0x3F800000, bits], dtype=np.uint32).view(np.float32))
    histogram = Histogram.of(delta)
    np.testing.assert_array_equal(
        histogram.table[0], [0x3F800000 >> BIN_SHIFT, (bits & 0x7FFFFFFF) >> BIN_SHIFT]
    )
    np.testing.assert_array_equal(histogram.table[1], [1, 2])


@pytest.mark.parametrize("number", [1, 3, 7])
def test_of_n_elements_of_a_bin_k_have_the_lowest_tie_numbers(number: int) -> None:
    start = (0x3F800000 >> BIN_SHIFT) * TIES
    band = Histogram.of(torch.tensor([0.5, *[1.0] * 8, 2.0])).band(0, 1 + number)
    assert band.highest + 1 == start + number * TIES // 8
    band = Histogram.of(torch.ones(8)).largest(number)
    assert band.lowest == start + (8 - number) * TIES // 8


def test_a_band_holds_at_least_one_key_of_the_bin_it_begins_in() -> None:
    """Where a share of a large bin is smaller than one tie number."""
    histogram = Histogram(np.stack([[100.0, 200.0], [2.0**34, 2.0**35], [1e9, 2e9]]))
    last_of_first = 101 * TIES - 1
    assert histogram.band(2**34 - 1, 2**34 + 1) == Band(last_of_first, 200 * TIES - 1)
    assert histogram.band(2**34 - 1, 2**34) == Band(last_of_first, 200 * TIES - 1)
    assert histogram.band(2**34, 2**34 + 1) == Band(200 * TIES, 200 * TIES)
    assert histogram.largest(1) == Band(201 * TIES - 1)
