"""Model Breadcrumbs: the smallest and the largest elements of task vectors are left out."""

from __future__ import annotations

import math

import pytest
import torch

from .inputs import close, family, merge, mergekit, weights
from .trimming import assert_trimmed_alike, at_ends, coarse


def masked(delta: torch.Tensor, density: float, gamma: float, seed: int = 0) -> torch.Tensor:
    values = weights(1.0, density=density, gamma=gamma)
    return merge("breadcrumbs", [torch.zeros_like(delta), delta], values, base=0, seed=seed)


def ends(count: int, density: float, gamma: float) -> tuple[int, int]:
    """Ascending ranks that mergekit keeps."""
    kept = int(density * count)
    first = max(0, count - kept - int(gamma * count))
    return first, first + kept


def test_the_smallest_and_the_largest_go() -> None:
    delta = torch.tensor([[0.1, -5.0, 3.0, 9.0], [-2.0, 4.0, 1.0, -7.0]])
    # Half of 8 elements stay, two (a quarter) of the largest go.
    assert masked(delta, 0.5, 0.25).tolist() == [[0, -5.0, 3.0, 0], [-2.0, 4.0, 0, 0]]


def test_a_high_density_takes_back_the_largest() -> None:
    delta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Three of four: no room to drop the two largest, only the largest is left out.
    assert masked(delta, 0.75, 0.5).tolist() == [1.0, 2.0, 3.0, 0.0]
    assert masked(delta, 0.75, 0.0).tolist() == [0.0, 2.0, 3.0, 4.0]
    assert masked(delta, 1.0, 0.5).tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("count", [11, 1001, 1 << 20])
def test_continuous_task_vectors_are_masked_as_by_mergekit(density: float, gamma: float, count: int) -> None:
    from mergekit.sparsify import magnitude_outliers

    delta = family(count, seed=count)[0]
    theirs = magnitude_outliers(delta, density, gamma=gamma)
    assert_trimmed_alike(masked(delta, density, gamma), theirs, delta, *ends(count, density, gamma))


@pytest.mark.parametrize("density", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_coarse_task_vectors_are_masked_as_by_mergekit(density: float, gamma: float) -> None:
    from mergekit.sparsify import magnitude_outliers

    delta = coarse(1 << 20)
    theirs = magnitude_outliers(delta, density, gamma=gamma)
    assert_trimmed_alike(masked(delta, density, gamma), theirs, delta, *ends(1 << 20, density, gamma))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.4])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_it_is_mergekits_on_continuous_weights(
    method: str, normalize: bool, rescale: bool, scale: float
) -> None:
    values = weights(0.5, 0.9, -0.2, density=0.6, gamma=0.05)
    given = {"tensors": family(31, 17), "values": values, "base": 0, "normalize": normalize, "lambda": scale}
    base, *others = given["tensors"]
    first, end = ends(31 * 17, 0.6, 0.05)
    clear = ~sum((at_ends(tensor - base, first, end) for tensor in others), torch.tensor(False))
    assert int((~clear).sum()) < 20
    ours, theirs = merge(method, **given, rescale=rescale), mergekit(method, **given, rescale=rescale)
    if rescale:
        # The norm of what is kept is known up to the bins at the thresholds.
        torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-5, atol=1e-5)
    else:
        close(ours[clear], theirs[clear])


def test_rescaling_restores_the_norm() -> None:
    for delta in (family(1 << 16)[0], coarse(1 << 16)):
        values = weights(1.0, density=0.4, gamma=0.1)
        merged = merge("breadcrumbs", [torch.zeros_like(delta), delta], values, base=0, rescale=True)
        assert float(merged.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0])
def test_a_single_element_is_kept(shape: tuple[int, ...], gamma: float) -> None:
    """mergekit turns it to zero."""
    delta = torch.full(shape, -2.5)
    assert masked(delta, 0.9, gamma).equal(delta)
    assert mergekit(
        "breadcrumbs", [delta * 0, delta], weights(1.0, density=0.9, gamma=gamma), base=0
    ).item() in (0.0,)


def test_equal_magnitudes_are_chosen_among_by_the_hash() -> None:
    delta = torch.ones(1 << 16)
    kept = masked(delta, 0.3, 0.1) != 0
    deviation = math.sqrt(0.3 * 0.7 * (1 << 16))
    assert abs(int(kept.sum()) - 0.3 * (1 << 16)) < 4 * deviation
    assert abs(int(kept[: 1 << 15].sum()) - 0.15 * (1 << 16)) < 4 * deviation
    assert not torch.equal(kept, masked(delta, 0.3, 0.1, seed=1) != 0)


def test_nothing_of_nothing() -> None:
    assert masked(torch.zeros(0, 3), 0.5, 0.1).shape == (0, 3)
    assert masked(torch.zeros(7), 0.5, 0.1).equal(torch.zeros(7))
