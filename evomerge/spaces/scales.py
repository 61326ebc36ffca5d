"""The scales of the hops of a path: none, one per slot, one per pair of layers, or by a small network.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.2: W_ij scales what goes from layer i to layer j, and where the matrix W would be too large,
W_ij = π_θ(i, j, t) is a feed-forward network with the step t as a further input. Its form is not published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from evomerge.records import Dimension
from evomerge.spaces.data_flow_settings import (
    HopScaleSettings,
    MatrixScaleSettings,
    NetworkScaleSettings,
    ScaleSettings,
)
from evomerge.spaces.steps import Encoding, Pool, Step


class Scales(Protocol):
    """Gives the steps of a path their scales."""

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """What is searched."""
        ...

    def values(self, genes: Sequence[float], steps: Sequence[Step]) -> list[float]:
        """The scale of each step, from one number per dimension."""
        ...


class NoScales:
    """A scale of 1 everywhere."""

    dimensions: Sequence[Dimension] = ()

    def values(self, genes: Sequence[float], steps: Sequence[Step]) -> list[float]:  # noqa: ARG002
        """1 for every step."""
        return [1.0] * len(steps)


class HopScales:
    """A scale per slot, `scale[math.3].0`; steps without a slot have 1."""

    def __init__(self, settings: HopScaleSettings, encoding: Encoding) -> None:
        self.dimensions: Sequence[Dimension] = tuple(
            settings.dimension(f"scale{slot}") for slot in encoding.slots
        )

    def values(self, genes: Sequence[float], steps: Sequence[Step]) -> list[float]:
        """The scale of the slot of each step."""
        return [1.0 if step.slot is None else float(genes[step.slot]) for step in steps]


class MatrixScales:
    """W_ij for layers i and j of the pool, `scale[math.3 -> code.7]`, and one for the first hop of the path."""

    def __init__(self, settings: MatrixScaleSettings, pool: Pool) -> None:
        self._size = len(pool.labels)
        names = [f"-> {pool.labels[pool.first]}"]
        names += [f"{left} -> {entered}" for left in pool.labels for entered in pool.labels]
        self.dimensions: Sequence[Dimension] = tuple(settings.dimension(f"scale[{name}]") for name in names)

    def values(self, genes: Sequence[float], steps: Sequence[Step]) -> list[float]:
        """W_ij with the layer i of the step before and the layer j of each step."""
        pairs = pairwise(step.layer for step in steps)
        return [float(genes[0]), *(float(genes[1 + i * self._size + j]) for i, j in pairs)]


class NetworkScales:
    """W_ij = 1 + b + Σ_k v_k tanh(a_k i/M + b_k j/M + c_k t/T + d_k), so that θ = 0 leaves everything as it is.

    Layers count from 1 to M, the size of the pool; i = 0 stands for the embedding. Steps count from 0; T is
    the most that a path can have. The inputs' weights of hidden unit k are named `scale.k.from`, `scale.k.to`
    and `scale.k.step`, its bias `scale.k.bias`, its weight in the output `scale.k.out`; b is `scale.bias`.
    """

    def __init__(self, settings: NetworkScaleSettings, pool: Pool, encoding: Encoding) -> None:
        self._num_layers = len(pool.layers)
        self._num_steps = encoding.max_steps
        parts = ("from", "to", "step", "bias", "out")
        names = [f"scale.{unit}.{part}" for unit in range(settings.hidden) for part in parts]
        self.dimensions: Sequence[Dimension] = tuple(
            settings.dimension(name) for name in [*names, "scale.bias"]
        )

    def values(self, genes: Sequence[float], steps: Sequence[Step]) -> list[float]:
        """What the network says of each step."""
        *units, bias = genes
        hidden = list(zip(*(units[part::5] for part in range(5)), strict=True))
        layers = [0, *(step.layer + 1 for step in steps)]
        scales = []
        for step, (i, j) in enumerate(pairwise(layers)):
            left, entered, time = i / self._num_layers, j / self._num_layers, step / self._num_steps
            scale = 1.0 + bias
            for from_, to, when, offset, out in hidden:
                scale += out * math.tanh(from_ * left + to * entered + when * time + offset)
            scales.append(scale)
        return scales


def build_scales(settings: ScaleSettings, pool: Pool, encoding: Encoding) -> Scales:
    """The scales that settings ask for."""
    if isinstance(settings, HopScaleSettings):
        return HopScales(settings, encoding)
    if isinstance(settings, MatrixScaleSettings):
        return MatrixScales(settings, pool)
    if isinstance(settings, NetworkScaleSettings):
        return NetworkScales(settings, pool, encoding)
    return NoScales()
