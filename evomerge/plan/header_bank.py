"""A bank without weights: merges can be prepared with it to learn what they would need.

Tensors have shapes and types but no values. Where a method asks for statistics of the sources, it is given
those of a plain case, and what it asked for is noted with its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evomerge.checkpoints.reader import DTYPES, Checkpoint
from evomerge.merge.bank import Bank
from evomerge.merge.histogram import BIN_SHIFT, Histogram
from evomerge.merge.methods.base import Axis, GramKind
from evomerge.merge.statistics import Key

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

HISTOGRAM_BINS = 4000
"""Bins that differences of trained weights in bfloat16 occupy, rather fewer."""

_ONE_BIN = 0x3C000000 >> BIN_SHIFT
_BIN_BYTES = 24


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """What is kept of the sources for one tensor.

    Attributes:
        kind: `histogram`, `gram` or `ranks`.
        elements: Elements it is computed from.
        bytes: Its size, about.
    """

    kind: str
    elements: int
    bytes: int


class HeaderBank(Bank):
    """Hands out tensors without values.

    Args:
        sources: Model as the recipe names it -> its checkpoint.

    Attributes:
        asked: What identifies statistics that were asked for -> what they are.
    """

    def __init__(self, sources: Mapping[str, Checkpoint]) -> None:
        super().__init__(sources)
        self._headers = sources
        self.asked: dict[tuple[object, ...], Statistic] = {}

    def tensor(self, key: Key) -> Tensor:
        """A tensor of the right shape and type, without values."""
        import torch

        model, name = key
        info = self._headers[model].tensors[name]
        return torch.empty(info.shape, dtype=getattr(torch, DTYPES[info.dtype].torch_name), device="meta")

    def histogram(self, source: Key, base: Key) -> Histogram:
        """The histogram of a task vector whose elements are all of one size."""
        numel = self._numel(source)
        nbytes = _BIN_BYTES * min(numel, HISTOGRAM_BINS)
        self.asked["histogram", source, base] = Statistic(kind="histogram", elements=numel, bytes=nbytes)
        return Histogram(np.array([[_ONE_BIN], [numel], [numel]], dtype=np.float64))

    def gram(
        self, tensors: Sequence[Key], base: int | None, kind: GramKind, axis: Axis
    ) -> NDArray[np.float64]:
        """The inner products of vectors at right angles."""
        count = len(tensors) - (kind is GramKind.TASK_VECTORS and base is not None)
        shape = self._headers[tensors[0][0]].tensors[tensors[0][1]].shape or (1,)
        vectors = {Axis.WHOLE: (), Axis.ROWS: (math.prod(shape[:-1]),), Axis.COLUMNS: (shape[0],)}[axis]
        products = np.array(np.broadcast_to(np.eye(count), (*vectors, count, count)))
        self.asked["gram", axis, kind, tuple(tensors), base] = Statistic(
            kind="gram", elements=count * self._numel(tensors[0]), bytes=products.nbytes
        )
        return products

    def ranks(self, source: Key, base: Key) -> Tensor:
        """Ranks without values."""
        import torch

        numel = self._numel(source)
        ranks = torch.empty(numel, dtype=torch.uint16, device="meta")
        self.asked["ranks", source, base] = Statistic(kind="ranks", elements=numel, bytes=ranks.nbytes)
        return ranks

    def _numel(self, key: Key) -> int:
        return math.prod(self._headers[key[0]].tensors[key[1]].shape)
