"""The counter hash: fixed for ever, uniform, and independent in every part of its key."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch

from evomerge.merge.counter_hash import (
    hash_element,
    hash_elements,
    keep_mask,
    keys,
    threshold,
    tie_number,
    tie_numbers,
)

VECTORS = [
    # seed, tensor name, source, element, hash, tie number
    (0, "model.embed_tokens.weight", 0, 0, 1308662821, 15141),
    (0, "model.embed_tokens.weight", 0, 1, 4070843333, 9984),
    (0, "model.layers.0.mlp.up_proj.weight", 0, 12345, 3224551080, 25003),
    (0, "model.layers.0.mlp.up_proj.weight", 1, 12345, 1298023856, 20789),
    (1, "model.layers.0.mlp.up_proj.weight", 1, 12345, 3531472882, 25986),
    (9223372036854775807, "lm_head.weight", 2, 4294967295, 4245641399, 12766),
    (7, "lm_head.weight", 2, 4294967296, 2914504329, 6226),
    (7, "lm_head.weight", 2, 1099511627779, 3916643885, 13333),
]
COUNT = 1 << 18


def hashes(seed: int = 0, name: str = "model.layers.0.mlp.up_proj.weight", source: int = 0) -> torch.Tensor:
    return hash_elements(torch.arange(COUNT), *keys(seed, name, source))


def ties(seed: int = 0, name: str = "model.layers.0.mlp.up_proj.weight", source: int = 0) -> torch.Tensor:
    return tie_numbers(torch.arange(COUNT), *keys(seed, name, source))


def unlikeliness(numbers: torch.Tensor, kinds: int = 256) -> float:
    """How many standard deviations chi-square lies above its mean, if the numbers are uniform on 0 .. kinds - 1."""
    counts = torch.bincount(numbers, minlength=kinds).double()
    expected = len(numbers) / kinds
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - (kinds - 1)) / math.sqrt(2 * (kinds - 1))


def mask(
    probability: float, *, count: int = COUNT, seed: int = 0, name: str = "w", source: int = 0
) -> torch.Tensor:
    return keep_mask(count, probability, seed=seed, tensor_name=name, source=source)


@pytest.mark.parametrize(("seed", "name", "source", "element", "expected", "tie"), VECTORS)
def test_hashes_are_those_of_the_documentation(
    seed: int, name: str, source: int, element: int, expected: int, tie: int
) -> None:
    both_keys = keys(seed, name, source)
    assert hash_element(element, *both_keys) == expected
    assert hash_elements(torch.tensor([element]), *both_keys).item() == expected
    assert tie_number(element, *both_keys) == tie
    assert tie_numbers(torch.tensor([element]), *both_keys).item() == tie


def test_the_documentation_lists_the_same_vectors() -> None:
    text = (Path(__file__).parents[2] / "docs" / "counter_hash.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(.+?)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [(int(a), b, *map(int, rest)) for a, b, *rest in rows] == VECTORS


def test_the_tensor_version_is_the_scalar_definition() -> None:
    draw = random.Random(0)
    elements = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**62]
    elements += [draw.randrange(2**63) for _ in range(200)]
    for seed in range(5):
        k0, k1 = keys(seed, "w", seed)
        before = torch.tensor(elements)
        found = hash_elements(before, k0, k1)
        assert found.tolist() == [hash_element(element, k0, k1) for element in elements]
        assert tie_numbers(before, k0, k1).tolist() == [tie_number(element, k0, k1) for element in elements]
        assert before.tolist() == elements
        assert int(found.min()) >= 0
        assert int(found.max()) < 2**32


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_probability(probability: float) -> None:
    for source in range(4):
        kept = int(mask(probability, source=source).sum())
        deviation = math.sqrt(COUNT * probability * (1 - probability))
        assert abs(kept - COUNT * probability) < 4 * deviation


def test_hashes_and_tie_numbers_are_uniform() -> None:
    for numbers in (hashes() >> 24, hashes() & 255, ties() >> 7, ties() & 255):
        assert abs(unlikeliness(numbers)) < 5
        assert abs(unlikeliness(numbers[::2])) < 5
        assert abs(unlikeliness(numbers[1::2])) < 5
    assert int(ties().min()) >= 0
    assert int(ties().max()) < 2**15


def test_no_tensor_has_sources_whose_tie_numbers_depend_on_each_other() -> None:
    """A weaker hash shows in some pairs of keys only."""
    for layer in range(40):
        numbers = [
            ties(name=f"model.layers.{layer}.mlp.up_proj.weight", source=source) for source in range(3)
        ]
        for a, b in itertools.combinations(numbers, 2):
            assert unlikeliness((a >> 11) * 16 + (b >> 11)) < 6
            assert unlikeliness((a & 15) * 16 + (b & 15)) < 6


@pytest.mark.parametrize(
    "other",
    [{"source": 1}, {"source": 2}, {"seed": 1}, {"name": "model.layers.1.mlp.up_proj.weight"}],
    ids=["source", "other source", "seed", "tensor"],
)
def test_other_sources_seeds_and_tensors_are_independent(other: dict[str, int]) -> None:
    """The joint table of the two hashes' high nibbles is that of independent uniform numbers."""
    joint = (hashes() >> 28) * 16 + (hashes(**other) >> 28)  # type: ignore[arg-type]
    assert abs(unlikeliness(joint)) < 5
    joint = (ties() >> 11) * 16 + (ties(**other) >> 11)  # type: ignore[arg-type]
    assert unlikeliness(joint) < 5
    assert unlikeliness(joint[::2]) < 5


def test_neighbouring_elements_are_independent() -> None:
    for step in (1, 2, 3, 64, 1024):
        assert unlikeliness((hashes()[:-step] >> 28) * 16 + (hashes()[step:] >> 28)) < 5
        joint = (ties()[:-step] >> 11) * 16 + (ties()[step:] >> 11)
        assert unlikeliness(joint) < 5
        assert unlikeliness(joint[::2]) < 5  # those that share a hash, for a step of 1


def test_masks_are_nested_in_the_probability() -> None:
    masks = [mask(p) for p in (0.001, 0.1, 0.1000001, 0.5, 0.99, 1.0)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    assert masks[-1].all()


def test_nothing_is_kept_with_probability_0() -> None:
    assert not mask(0.0).any()
    assert (threshold(0.0), threshold(0.5), threshold(1.0)) == (0, 2**31, 2**32)


@pytest.mark.parametrize("count", [0, 1, 7, (1 << 20) - 1, (1 << 20) + 3])
def test_masks_do_not_depend_on_chunks(count: int) -> None:
    whole = hash_elements(torch.arange(count), *keys(3, "w", 2)) < threshold(0.3)
    assert torch.equal(mask(0.3, count=count, seed=3, source=2), whole)


def test_texts_in_the_key_cannot_run_into_each_other() -> None:
    assert len({keys(1, "1", 1), keys(11, "", 1), keys(1, "", 11), keys(1, "11", 1), keys(1, "1", 11)}) == 5
