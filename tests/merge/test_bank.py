"""Where the bank keeps tensors and computes statistics: pieces and devices change no bit of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.merge import bank as bank_module
from evomerge.merge.bank import Bank
from evomerge.merge.histogram import Histogram
from evomerge.merge.methods.base import Axis, GramKind, MergeInputs
from evomerge.merge.methods.combination import gram_matrices
from evomerge.merge.methods.task_vectors import row_ranks

ONE, BASE = ("one", "w"), ("base", "w")
SHAPES = [(), (0,), (1,), (1000,), (0, 3), (7, 1), (7, 333), (3, 4, 50)]


class Source:
    """A model of one tensor, random but for its shape."""

    def __init__(self, seed: int, *shape: int) -> None:
        self.reads: Counter[str] = Counter()
        self._tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def tensor(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self._tensor

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        pass


def models(*shape: int) -> dict[str, Source]:
    return {"base": Source(0, *shape), "one": Source(1, *shape)}


def delta(sources: dict[str, Source]) -> torch.Tensor:
    return sources["one"].tensor("w").float() - sources["base"].tensor("w").float()


@pytest.mark.parametrize("budget", [None, 1 << 30])
def test_a_line_is_the_tensor_itself(budget: int | None) -> None:
    sources = models(7, 3)
    line = Bank(sources, budget=budget).line(ONE)
    assert line.array is not None
    assert line.tensor.shape == line.array.shape == (21,)
    stored = sources["one"].tensor("w")
    assert line.tensor.data_ptr() == line.array.ctypes.data == stored.data_ptr()


def test_lines_are_made_again_only_under_a_budget() -> None:
    kept, passing = Bank(models(7, 3)), Bank(models(7, 3), budget=1 << 30)
    assert kept.line(ONE) is kept.line(ONE)
    assert passing.line(ONE) is not passing.line(ONE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [1, 700, 1 << 24])
def test_ranks_do_not_depend_on_pieces(
    shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "PIECE", piece)
    sources = models(*shape)
    ranks = Bank(sources).ranks(ONE, BASE)
    assert ranks.dtype == torch.uint16
    assert torch.equal(ranks.int(), row_ranks(delta(sources)).view(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [1, 700])
def test_histograms_counted_in_pieces_on_a_device_are_those_of_the_whole_on_the_cpu(
    shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "PIECE", piece)
    sources = models(*shape)
    expected = Bank(sources).histogram(ONE, BASE).table
    monkeypatch.setattr(Bank, "_counts_there", True)
    found = Bank(sources).histogram(ONE, BASE).table
    assert np.array_equal(found, expected)
    assert np.array_equal(found, Histogram.of(delta(sources)).table)


def on_no_device(**given: Any) -> tuple[Bank, dict[str, Source]]:
    """A bank on a device without content, which nothing can be computed on."""
    sources = models(7, 333)
    return Bank(sources, device="meta", **given), sources


def test_devices_that_may_lack_64_bit_numbers_leave_statistics_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank, sources = on_no_device()
    here = Bank(sources)
    assert np.array_equal(bank.histogram(ONE, BASE).table, here.histogram(ONE, BASE).table)
    for axis in Axis:
        found, expected = (each.gram([BASE, ONE], 0, GramKind.TASK_VECTORS, axis) for each in (bank, here))
        assert np.array_equal(found, expected)
    assert bank.ranks(ONE, BASE).is_meta


def test_ranks_stay_on_the_device_as_far_as_the_budget_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = on_no_device()
    assert bank.ranks(ONE, BASE) is bank.ranks(ONE, BASE)
    nbytes = 2 * 7 * 333
    bank, sources = on_no_device(budget=2 * nbytes - 1)
    assert bank.ranks(ONE, BASE) is bank.ranks(ONE, BASE)
    sources["one"].reads.clear()
    for _ in range(3):
        assert bank.tensor(ONE).is_meta
    assert sources["one"].reads["w"] == 3, "ranks count towards the budget"
    bank, _ = on_no_device(budget=nbytes - 1)
    assert bank.ranks(ONE, BASE) is not bank.ranks(ONE, BASE)


# On the CPU.


class Shelf:
    """A model of several tensors of 16 bytes, on disk or not."""

    def __init__(self, *names: str, content: str = "x") -> None:
        self.tensors = {name: torch.full((4,), float(place)) for place, name in enumerate(names)}
        self.content = content
        self.hashed = 0
        self.released: list[str] = []
        self.released_parts: list[tuple[int, int]] = []

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def content_hash(self) -> str:
        self.hashed += 1
        return self.content

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        if count is None:
            self.released.append(name)
        else:
            self.released_parts.append((first, first + count))


def test_on_the_cpu_tensors_are_the_sources_own() -> None:
    shelf = Shelf("a", "b")
    bank = Bank({"one": shelf})
    for _ in range(2):
        for name in ("a", "b"):
            assert bank.tensor(("one", name)).data_ptr() == shelf.tensors[name].data_ptr()
    assert shelf.released == []


def test_on_the_cpu_the_budget_releases_what_was_used_first() -> None:
    shelf, other = Shelf("a", "b", "c"), Shelf("a")
    bank = Bank({"one": shelf, "two": other}, budget=40)
    bank.tensor(("one", "a"))
    bank.tensor(("one", "b"))
    bank.tensor(("one", "a"))
    assert (shelf.released, other.released) == ([], [])
    bank.tensor(("two", "a"))
    assert (shelf.released, other.released) == (["a"], [])
    bank.tensor(("one", "c"))
    assert (shelf.released, other.released) == (["a", "b"], [])
    # A released tensor is read again, and another makes room for it.
    assert bank.tensor(("one", "a")).equal(shelf.tensors["a"])
    assert (shelf.released, other.released) == (["a", "b"], ["a"])


def test_what_fits_the_budget_exactly_stays() -> None:
    shelf = Shelf("a", "b")
    bank = Bank({"one": shelf}, budget=32)
    for name in ("a", "b", "a", "b"):
        bank.tensor(("one", name))
    assert shelf.released == []


def test_a_tensor_beyond_the_budget_is_given_all_the_same() -> None:
    shelf = Shelf("a", "b")
    bank = Bank({"one": shelf}, budget=1)
    assert bank.tensor(("one", "a")).equal(shelf.tensors["a"])
    assert bank.tensor(("one", "b")).equal(shelf.tensors["b"])
    assert shelf.released == ["a"]


def test_elsewhere_tensors_are_copied_once_as_far_as_the_budget_reaches() -> None:
    bank = Bank({"one": Shelf("a", "b", "c")}, device="meta", budget=32)
    first = {name: bank.tensor(("one", name)) for name in ("a", "b", "c")}
    assert all(tensor.device.type == "meta" for tensor in first.values())
    kept = {name for name, tensor in first.items() if bank.tensor(("one", name)) is tensor}
    assert kept == {"a", "b"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("base", [None, 0, 2])
def test_inner_products_are_those_of_the_reference(dtype: torch.dtype, axis: Axis, base: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(7, 33, generator=generator).to(dtype) for _ in range(3)]
    sources = {str(place): Shelf("w") for place in range(3)}
    for place, tensor in enumerate(given):
        sources[str(place)].tensors["w"] = tensor
    keys = [(str(place), "w") for place in range(3)]
    for kind in [GramKind.TENSORS] if base is None else GramKind:
        inputs = MergeInputs(
            name="w", tensors=[tensor.float() for tensor in given], base=base, shared={}, values=(), seed=0
        )
        found = Bank(sources).gram(keys, base, kind, axis)
        np.testing.assert_allclose(found, gram_matrices(inputs, kind, axis), rtol=1e-12, atol=1e-12)


def test_statistics_are_kept_by_content(tmp_path: Path) -> None:
    def bank(one: str = "1") -> tuple[Bank, Shelf]:
        shelf = Shelf("v", "w", content=one)
        return Bank({"base": Shelf("v", "w", content="b"), "one": shelf}, statistics=tmp_path), shelf

    def ask(bank: Bank) -> list[Any]:
        return [
            bank.histogram(ONE, BASE).table,
            bank.ranks(ONE, BASE).numpy(),
            *(bank.gram([ONE, BASE], 1, kind, axis) for kind in GramKind for axis in Axis),
            bank.gram([ONE, BASE], 0, GramKind.TASK_VECTORS, Axis.WHOLE),
            bank.gram([BASE, ONE], None, GramKind.TENSORS, Axis.WHOLE),
        ]

    first, shelf = bank()
    expected = ask(first)
    assert [array.shape for array in expected[2:]] == [
        *[(2, 2), (1, 2, 2), (1, 2, 2)],
        *[(1, 1), (1, 1, 1), (1, 1, 1)],
        *[(1, 1), (2, 2)],
    ]
    assert shelf.hashed == 1
    num_files = len(list(tmp_path.rglob("*.npy")))
    assert num_files == len(expected)
    second, shelf = bank()
    shelf.tensors["w"] = torch.full((4,), 77.0)  # nobody should look at it
    for array, known in zip(ask(second), expected, strict=True):
        np.testing.assert_array_equal(array, known)
    assert len(list(tmp_path.rglob("*.npy"))) == num_files
    third, shelf = bank("2")
    shelf.tensors["w"] = torch.full((4,), 77.0)
    assert third.histogram(ONE, BASE).norm == 4 * 76


@pytest.mark.parametrize("budget", [None, 1 << 30])
def test_with_a_budget_statistics_give_back_what_they_have_read(budget: int | None) -> None:
    sources = {"base": Shelf("w"), "one": Shelf("w")}
    for shelf in sources.values():
        shelf.tensors["w"] = torch.randn(300, 1000)
    for ask in (
        lambda bank: bank.histogram(ONE, BASE),
        lambda bank: bank.ranks(ONE, BASE),
        lambda bank: bank.gram([ONE, BASE], 1, GramKind.TASK_VECTORS, Axis.WHOLE),
    ):
        ask(Bank(sources, budget=budget))
        for shelf in sources.values():
            covered = torch.zeros(300_000, dtype=torch.bool)
            for first, end in shelf.released_parts:
                covered[first:end] = True
            assert bool(covered.all()) is (budget is not None)
            assert bool(covered.any()) is (budget is not None)
            shelf.released_parts.clear()


def test_without_a_folder_no_model_is_hashed() -> None:
    shelf = Shelf("w")
    bank = Bank({"base": Shelf("w"), "one": shelf})
    bank.histogram(ONE, BASE)
    bank.gram([ONE, BASE], None, GramKind.TENSORS, Axis.ROWS)
    assert shelf.hashed == 0


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float64, torch.float16)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_histograms_are_those_of_the_difference_in_float32(
    dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]
) -> None:
    sources = {"base": Shelf("w"), "one": Shelf("w")}
    for shelf, dtype, seed in zip(sources.values(), dtypes, (1, 2), strict=True):
        shelf.tensors["w"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    delta = sources["one"].tensor("w").float() - sources["base"].tensor("w").float()
    found = Bank(sources).histogram(ONE, BASE).table
    np.testing.assert_array_equal(found, Histogram.of(delta).table)
