r"""Uniform random numbers without generator state: a hash of (seed, tensor, source, element).

The same recipe gives the same bits on every worker, device and machine, in any chunking, and again at
export. Every candidate sees the same uniform numbers, so its masks are nested in the keep probability and
fitness does not jump with the seed.

The hash. The text `seed "\n" tensor name` is digested by BLAKE2b to 4 bytes, read as the little-endian
uint32 key k0; with `"\n" source position` appended it gives k1. Element e = 2^32 e1 + e0 is mixed in 32-bit
arithmetic:

    x = e0 ^ k0 ^ (e1 * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (x >> 15)                       up to here the same for all sources
    x = (x ^ k1) * 0x846CA68B
    h = (x ^ (x >> 16)) * 0x9E3779B1

(the first multipliers and shifts are those of Chris Wellons' `lowbias32`,
https://nullprogram.com/blog/2018/07/31/). The first half is shared by all sources, so that a kernel that merges
several computes it once.
The uniform number is h / 2^32; an element is kept with probability p iff h < round(p 2^32).

Among equals, as TIES meets them at its threshold, an element's tie number of 15 bits decides. Elements 2m and
2m + 1 share the hash h of element 2m, so that a pair needs one: the tie number of the odd one is h >> 17, that of the
even one (h ^ (h >> 17)) mod 2^15.
Test vectors stand in `docs/counter_hash.md` and in the tests.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 0xFFFFFFFF


@functools.lru_cache(maxsize=1 << 16)
def keys(seed: int, tensor_name: str, source: int) -> tuple[int, int]:
    """The two 32-bit keys of one tensor of one source; the first is the tensor's, for every source."""
    tensor = f"{seed}\n{tensor_name}"
    return _key(tensor), _key(f"{tensor}\n{source}")


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def threshold(probability: float) -> int:
    """The bound below which a hash value means "keep": round(p 2^32), an int in [0, 2^32]."""
    return round(probability * 2**32)


def hash_element(element: int, k0: int, k1: int) -> int:
    """The hash of one element, an int in [0, 2^32); the definition the tensor version is tested against."""
    x = (element & _MASK) ^ k0 ^ ((element >> 32) * 0x9E3779B9 & _MASK)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15) ^ k1) * 0x846CA68B) & _MASK
    return ((x ^ (x >> 16)) * 0x9E3779B1) & _MASK


def tie_number(element: int, k0: int, k1: int) -> int:
    """The tie number of one element, an int in [0, 2^15); the definition the tensor version is tested against."""
    h = hash_element(element & ~1, k0, k1)
    return h >> 17 if element & 1 else (h ^ (h >> 17)) & 0x7FFF


def hash_elements(elements: Tensor, k0: int, k1: int) -> Tensor:
    """Hashes of the given elements, int64 of their shape with values < 2^32.

    Args:
        elements: Positions in the flattened tensor, int64 of any shape; left unchanged.
        k0: First key.
        k1: Second key.
    """
    # int64 products wrap modulo 2^64, which keeps their low 32 bits right.
    x = (elements >> 32).mul_(0x9E3779B9).bitwise_xor_(elements).bitwise_xor_(k0).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 15).bitwise_xor_(k1).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16).mul_(0x9E3779B1).bitwise_and_(_MASK)


def tie_numbers(elements: Tensor, k0: int, k1: int) -> Tensor:
    """Tie numbers of the given elements, int64 of their shape with values < 2^15; see `hash_elements`."""
    import torch

    h = hash_elements(elements & ~1, k0, k1)
    return torch.where(elements & 1 == 1, h >> 17, (h ^ (h >> 17)) & 0x7FFF)


def keep_mask(
    count: int, probability: float, *, seed: int, tensor_name: str, source: int, first: int = 0
) -> Tensor:
    """Boolean mask of shape [count]: element e is kept iff its hash is below the threshold.

    Args:
        count: Number of elements.
        probability: Chance of each element to be kept, in [0, 1].
        seed: The recipe's seed.
        tensor_name: Name of the output tensor.
        source: Position of the source among the recipe's inputs.
        first: Position of the first element in the whole tensor.
    """
    import torch

    hashes = hash_elements(torch.arange(first, first + count), *keys(seed, tensor_name, source))
    return hashes < threshold(probability)
