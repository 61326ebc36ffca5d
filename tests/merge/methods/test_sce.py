"""SCE: select by variance, weigh by size, erase minority signs."""

from __future__ import annotations

import pytest
import torch

from evomerge.merge.methods.sce import most_varied

from .inputs import close, family, merge, mergekit

ZERO = torch.zeros(4)


def test_models_count_by_the_mean_square_of_their_change() -> None:
    merged = merge("sce", [ZERO, torch.full((4,), 1.0), torch.full((4,), 3.0)], base=0)
    torch.testing.assert_close(merged, torch.full((4,), 0.1 * 1 + 0.9 * 3))


def test_a_minority_of_signs_is_erased_element_by_element() -> None:
    a, b = torch.tensor([2.0, 2.0, 2.0, 0.0]), torch.tensor([-1.0, -3.0, 2.0, 1.0])
    # Their squares sum to 12 and 15; where one is erased, the other stands alone.
    assert merge("sce", [ZERO, a, b], base=0).tolist() == [2.0, -3.0, 2.0, 1.0]


def test_where_changes_cancel_the_positive_one_stays() -> None:
    assert merge("sce", [[0.0], [1.0], [-1.0]], base=0).tolist() == [1.0]


def test_the_elements_that_differ_most_are_selected() -> None:
    a, b = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    kept = merge("sce", [ZERO, a, b], base=0, select_topk=0.7) != 0  # of three that differ, two
    assert kept.tolist() == [False, False, True, True]


def test_of_equally_varied_elements_the_first_are_selected() -> None:
    variance = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    assert most_varied(variance, 0.6).tolist() == [[True, True, True], [False, False, False]]
    assert most_varied(variance, 0.2).tolist() == [[False, True, False], [False, False, False]]
    assert most_varied(variance, 1.0).tolist() == [[True, True, True], [False, True, True]]
    assert not most_varied(variance, 0.1).any()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.29, 0.5, 0.999])
def test_the_selected_share_is_mergekits(share: float) -> None:
    from mergekit.merge_methods.sce import sce_mask

    tensors = torch.stack(family(100, 7, count=2))
    variance = tensors.var(dim=0, correction=0)
    assert torch.equal(most_varied(variance, share), sce_mask(tensors, share).bool())


def test_models_that_hardly_changed_count_alike() -> None:
    merged = merge("sce", [ZERO, torch.full((4,), 1e-4), torch.full((4,), 3e-4)], base=0)
    torch.testing.assert_close(merged, torch.full((4,), 2e-4))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (17, 31), (2, 3, 5)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("select_topk", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("change", [1e-4, 0.1, 1.0])
def test_it_is_mergekits(shape: tuple[int, ...], count: int, select_topk: float, change: float) -> None:
    tensors = family(*shape, count=count, change=change)
    given = {"base": 0, "select_topk": select_topk}
    close(merge("sce", tensors, **given), mergekit("sce", tensors, **given))
    close(merge("sce", tensors, int8_mask=True, **given), mergekit("sce", tensors, int8_mask=True, **given))


def test_models_equal_to_the_base_change_nothing() -> None:
    (base,) = family(5, 5, count=0)
    for select_topk in (0.5, 1.0):
        given = {"base": 0, "select_topk": select_topk}
        assert torch.equal(merge("sce", [base, base.clone(), base.clone()], **given), base)
