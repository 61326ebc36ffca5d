"""DELLA: elements are dropped at random, small ones more often; what stays is divided by its chance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torch import Tensor

from evomerge.errors import ConfigurationError

from .inputs import family, merge, mergekit, weights

ROWS, COLUMNS = 40_000, 5


def shuffled_rows(*shape: int) -> tuple[Tensor, Tensor]:
    """Rows of distinct magnitudes in random order and with random signs, and the rank of each."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.rand(shape, generator=generator).argsort(dim=-1)
    signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return signs * (ranks + 1), ranks


def pruned(delta: Tensor, density: float, epsilon: float, *, rescale: bool = False, seed: int = 0) -> Tensor:
    values = weights(1.0, density=density, epsilon=epsilon)
    given = [torch.zeros_like(delta), delta]
    return merge("della", given, values, base=0, rescale=rescale, seed=seed, normalize=False)


def chances(columns: int, density: float, epsilon: float) -> Tensor:
    return torch.linspace(density - epsilon, density + epsilon, columns, dtype=torch.float64)


def kept_by_rank(pruned_delta: Tensor, ranks: Tensor) -> Tensor:
    return torch.bincount(ranks[pruned_delta != 0], minlength=ranks.shape[-1]).double()


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.3, 0.1), (0.84, 0.15), (0.4, 0.0)])
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (ROWS // 8, 4, 2, COLUMNS)])
def test_the_chance_grows_with_the_rank_in_the_row(
    density: float, epsilon: float, shape: tuple[int, ...]
) -> None:
    delta, ranks = shuffled_rows(*shape)
    kept = kept_by_rank(pruned(delta, density, epsilon), ranks)
    rows = math.prod(shape[:-1])
    expected = rows * chances(COLUMNS, density, epsilon)
    deviation = (kept - expected) / (expected * (1 - expected / rows)).sqrt()
    assert deviation.abs().max() < 4
    # The same draw must not decide for all: elements of a row are kept independently of each other.
    both = ((pruned(delta, density, epsilon) != 0).double().sum(-1) == COLUMNS).sum()
    share = float(chances(COLUMNS, density, epsilon).prod())
    assert abs(float(both) - rows * share) < 4 * math.sqrt(rows * share) + 1


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.3, 0.1)])
def test_the_chances_are_mergekits(density: float, epsilon: float) -> None:
    from mergekit.sparsify import della_magprune

    delta, ranks = shuffled_rows(ROWS, COLUMNS)
    torch.manual_seed(1234)
    theirs = kept_by_rank(della_magprune(delta, density, epsilon), ranks)
    ours = kept_by_rank(pruned(delta, density, epsilon), ranks)
    expected = ROWS * chances(COLUMNS, density, epsilon)
    for kept in (ours, theirs):
        table = torch.cat([kept, ROWS - kept])
        wanted = torch.cat([expected, ROWS - expected])
        assert chisquare(table, wanted, ddof=COLUMNS - 1, sum_check=False).pvalue > 0.001


def test_what_stays_is_divided_by_its_chance() -> None:
    delta, ranks = shuffled_rows(ROWS, COLUMNS)
    found = pruned(delta, 0.5, 0.3, rescale=True)
    expected = delta / chances(COLUMNS, 0.5, 0.3)[ranks]
    kept = found != 0
    torch.testing.assert_close(found[kept].double(), expected[kept], rtol=1e-5, atol=0)
    assert (kept == (pruned(delta, 0.5, 0.3) != 0)).all()
    assert pruned(delta, 0.5, 0.3)[kept].equal(delta[kept])


def test_the_mean_over_seeds_is_the_whole_task_vector() -> None:
    delta = family(64)[0]
    runs = torch.stack([pruned(delta, 0.5, 0.2, rescale=True, seed=seed) for seed in range(400)])
    # Of an element kept with chance p and divided by it, the standard deviation is |δ| sqrt((1-p) / p).
    error = (runs.mean(0) - delta).abs() / delta.abs()
    assert float(error.max()) < 5 * math.sqrt(0.7 / 0.3) / math.sqrt(400)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_has_mergekits_distribution(method: str, normalize: bool) -> None:
    """Without rescaling, where the two differ by rule, the merged elements come from one distribution."""
    tensors = family(256, 256, count=2)
    values = weights(0.5, 0.8, density=0.4, epsilon=0.2)
    given = {"values": values, "base": 0, "normalize": normalize, "rescale": False}
    torch.manual_seed(1234)  # not that of `family`, whose numbers it would repeat
    ours, theirs = (run(method, tensors, **given) - tensors[0] for run in (merge, mergekit))
    # Kolmogorov-Smirnov, at a chance of 1 in 1000 of equal distributions differing by more.
    assert ks_2samp(ours.flatten(), theirs.flatten()).statistic < 1.95 * math.sqrt(2 / ours.numel())
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.03)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_nothing_is_random_at_density_1(method: str) -> None:
    """Whatever epsilon."""
    given = {"values": weights(0.5, 0.7, -0.3, density=1.0, epsilon=0.5), "base": 0}
    for shape in ((5, 7), (), (1,), (0, 3)):
        tensors = family(*shape)
        base, *others = (tensor.double() for tensor in tensors)
        merged = merge(method, tensors, **given, normalize=False)
        if method == "della_linear":
            exact = base + sum(w * (o - base) for w, o in zip((0.5, 0.7, -0.3), others, strict=True))
            torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-6)
        else:
            values = weights(0.5, 0.7, -0.3)
            assert merged.equal(merge("ties", tensors, values, base=0, normalize=False))


def test_it_is_ties_on_pruned_task_vectors() -> None:
    base, one, two = family(33, 17, count=2)
    zero = torch.zeros_like(base)
    kept = [
        # One at a time, but as the same source: its position is part of the hash.
        merge("della_linear", [base, one, base], weights(1.0, 0.0, density=0.5), base=0) - base,
        merge("della_linear", [base, base, two], weights(0.0, 1.0, density=0.5), base=0) - base,
    ]
    merged = merge("della", [base, one, two], weights(0.5, 0.7, density=0.5), base=0)
    expected = base + merge("ties", [zero, *kept], weights(0.5, 0.7), base=0, normalize=True)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.1, 0.1), (0.1, 0.2), (0.9, 0.1), (0.9, 0.3), (0.5, 0.5), (0.999, 0.15)]
)
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_chances_must_lie_between_0_and_1(method: str, density: float, epsilon: float) -> None:
    values = weights(1.0, density=density, epsilon=epsilon)
    with pytest.raises(ConfigurationError, match=r"parameters\.epsilon: w: expected density - epsilon > 0"):
        merge(method, family(4, 4, count=1), values, base=0)


@pytest.mark.parametrize("shape", [(200_000, 1), (1, 200_000, 1)])
def test_a_row_of_one_element_has_the_middle_chance(shape: tuple[int, ...]) -> None:
    kept = pruned(torch.ones(shape), 0.3, 0.2)
    assert abs(float(kept.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 200_000)
    found = pruned(torch.ones(shape), 0.3, 0.2, rescale=True)
    assert float(found.max()) == pytest.approx(1 / 0.3, rel=1e-4)


def test_a_scalar_is_a_row_of_one_element() -> None:
    found = {pruned(torch.tensor(2.0), 0.5, 0.2, rescale=True, seed=seed).item() for seed in range(20)}
    assert sorted(found) == [0.0, pytest.approx(4.0, rel=1e-4)]


def test_equal_magnitudes_are_ranked_by_position() -> None:
    kept = pruned(torch.ones(ROWS, COLUMNS), 0.5, 0.4) != 0
    expected = ROWS * chances(COLUMNS, 0.5, 0.4)
    deviation = (kept.double().sum(0) - expected) / (expected * (1 - expected / ROWS)).sqrt()
    assert deviation.abs().max() < 4


def test_what_is_kept_grows_with_the_density() -> None:
    delta = family(100, 50)[0]
    masks = [pruned(delta, density, 0.1) != 0 for density in (0.2, 0.5, 0.51, 0.8)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


def test_it_normalises_by_default() -> None:
    ones = [torch.zeros(4), torch.ones(4), torch.ones(4)]
    assert merge("della", ones, weights(0.5, 1.5), base=0).tolist() == [1.0] * 4
