"""Blocks hold every document once, and any prefix of them is like the whole."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from evomerge.fitness.base import DocumentSet
from evomerge.fitness.blocks import split_blocks

SHARES = (0.1, 0.2, 0.4, 0.7)


def subset(count: int, task: str = "t") -> DocumentSet:
    return DocumentSet(task=task, doc_ids=tuple(range(0, 3 * count, 3)), name=f"the {task}", complete=True)


@given(count=st.integers(1, 200), seed=st.integers(0, 5))
def test_every_document_is_in_one_block(count: int, seed: int) -> None:
    whole = subset(count)
    blocks = split_blocks([whole], SHARES, {}, seed=seed)
    found = [doc for block in blocks for part in block for doc in part.doc_ids]
    assert sorted(found) == list(whole.doc_ids)
    assert all(part.doc_ids == tuple(sorted(part.doc_ids)) for block in blocks for part in block)
    assert len(blocks[0][0].doc_ids) == max(min(2, count), round(0.1 * count))


def test_the_first_block_is_as_hard_as_all_documents() -> None:
    whole = subset(160)
    difficulty = {doc: float(doc % 16 == 0) for doc in whole.doc_ids}  # one in sixteen is easy
    share = sum(difficulty.values()) / len(difficulty)
    blocks = split_blocks([whole], SHARES, {"the t": difficulty}, seed=0)
    seen: list[int] = []
    for block in blocks:
        seen += block[0].doc_ids
        assert abs(sum(difficulty[doc] for doc in seen) / len(seen) - share) <= 2 / len(seen)


def test_the_seed_changes_the_order_among_equals_only() -> None:
    whole = subset(64)
    first, again, other = (split_blocks([whole], SHARES, {}, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_every_task_is_in_the_first_block() -> None:
    blocks = split_blocks([subset(100), subset(3, "small")], SHARES, {}, seed=0)
    assert [(part.name, len(part.doc_ids)) for part in blocks[0]] == [("the t", 10), ("the small", 2)]
    assert not blocks[0][0].complete


def test_a_block_is_scored_in_the_way_of_its_documents() -> None:
    for exact in (True, False):
        blocks = split_blocks([replace(subset(10), exact=exact)], SHARES, {}, seed=0)
        assert {part.exact for block in blocks for part in block} == {exact}


def test_a_task_is_in_the_blocks_until_its_documents_are_used_up() -> None:
    blocks = split_blocks([subset(100), subset(3, "small")], SHARES, {}, seed=0)
    assert [part.name for part in blocks[2]] == ["the t"]
