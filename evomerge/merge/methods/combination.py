"""Combinations of the inputs: inner products in float64, and the sums whose coefficients follow from them.

SLERP and its relatives never leave the span of their inputs, so an output tensor is Σ c_i θ_i with
coefficients that depend on the inputs' inner products alone. A method of this kind says how
(`Method.combination`); here is the plain way to carry it out.

Shapes: N inputs; the vectors of an axis are K of length L each, K L being the tensor's elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from evomerge.merge.methods.base import Axis, Combination, CombinationInputs, GramKind, MergeInputs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PIECE = 1 << 20
"""Elements per input that are held in float64 at once."""

SAME_DIRECTION = 2.0**-24
"""sin² of the angle below which float32 cannot tell two directions apart: its unit roundoff."""

NO_DIRECTION = 1e-6
"""Norm of a mean of unit vectors below which rounding, not the vectors, decides its direction."""


def vectors(tensor: Tensor, axis: Axis) -> Tensor:
    """The tensor as its K vectors along an axis, [K, L]: a view, or a copy where its strides need one."""
    shape = tuple(tensor.shape) or (1,)
    if axis is Axis.WHOLE:
        return tensor.reshape(1, tensor.numel())
    if axis is Axis.ROWS:
        return tensor.reshape(math.prod(shape[:-1]), shape[-1])
    return tensor.reshape(shape[0], math.prod(shape[1:])).T


def gram_matrices(inputs: MergeInputs, kind: GramKind, axis: Axis) -> NDArray[np.float64]:
    """Inner products of the inputs or of their task vectors: [N, N] for the whole tensor, else [K, N, N]."""
    import torch

    views = [vectors(tensor, axis) for tensor in inputs.tensors]
    picked = [views[index] for index in inputs.others] if kind is GramKind.TASK_VECTORS else views
    num_vectors, length = views[0].shape
    sizes = num_vectors, len(picked), len(picked)
    result = torch.zeros(sizes, dtype=torch.float64, device=views[0].device)
    width = max(1, min(length, PIECE))
    height = PIECE // width
    for top in range(0, num_vectors, height):
        for left in range(0, length, width):
            here = slice(top, top + height), slice(left, left + width)
            piece = torch.stack([view[here].double() for view in picked], dim=1)
            if kind is GramKind.TASK_VECTORS:
                assert inputs.base is not None
                piece -= views[inputs.base][here].unsqueeze(1)
            result[top : top + height] += piece @ piece.mT
    array: NDArray[np.float64] = result.cpu().numpy()
    return array[0] if axis is Axis.WHOLE else array


def combine(inputs: MergeInputs, combination: Combination) -> Tensor:
    """Σ c_i θ_i / d, or θ_base + Σ c_i (θ_i - θ_base) / d, in float32 with d the divisor."""
    import torch

    total: Tensor | None = None
    for index in inputs.others if combination.around_base else range(len(inputs.tensors)):
        tensor = inputs.tensors[index]
        if combination.around_base:
            tensor = tensor - inputs.base_tensor
        c = torch.as_tensor(combination.coefficients[..., index], dtype=torch.float32, device=tensor.device)
        term = vectors(tensor, combination.axis) * c.unsqueeze(-1)
        total = term if total is None else total.add_(term)
    assert total is not None
    total.div_(combination.divisor)
    if combination.axis is Axis.COLUMNS:
        total = total.T
    merged = total.reshape(inputs.tensors[0].shape)
    return merged.add_(inputs.base_tensor) if combination.around_base else merged


def merge_by(inputs: MergeInputs, combination: Callable[[CombinationInputs], Combination]) -> Tensor:
    """Merge one tensor as the combination that a method gives."""
    given = CombinationInputs(
        name=inputs.name,
        base=inputs.base,
        num_inputs=len(inputs.tensors),
        shared=inputs.shared,
        values=inputs.values,
        gram=lambda kind, axis: gram_matrices(inputs, kind, axis),
    )
    return combine(inputs, combination(given))


def gram_of_others(inputs: CombinationInputs, axis: Axis) -> NDArray[np.float64]:
    """Inner products of the task vectors, or of the inputs themselves when there is no base."""
    return inputs.gram(GramKind.TENSORS if inputs.base is None else GramKind.TASK_VECTORS, axis)


def sum_of_others(
    inputs: CombinationInputs, coefficients: NDArray[np.float64], axis: Axis = Axis.WHOLE
) -> Combination:
    """Base + Σ c_i δ_i over the task vectors, or Σ c_i θ_i over the inputs when there is no base."""
    if inputs.base is None:
        return Combination(coefficients=coefficients, axis=axis)
    return Combination(
        coefficients=np.insert(coefficients, inputs.base, 0.0, axis=-1), axis=axis, around_base=True
    )
