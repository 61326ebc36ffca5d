"""Model Stock: towards the average of the models, as far as the angles between them suggest.

Jang, Yun and Han, "Model Stock: All we need is just a few fine-tuned models", 2024,
https://arxiv.org/abs/2403.19522
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from evomerge.merge.methods.base import (
    Axis,
    BasePolicy,
    Combination,
    CombinationInputs,
    GramKind,
    MergeInputs,
    Method,
    Parameter,
    Scope,
)
from evomerge.merge.methods.combination import merge_by, sum_of_others

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

TINY_PRODUCT = 1e-6
"""Product of two norms below which their cosine is taken towards 0, as in mergekit."""
SINGULAR = 1e-6
"""|1 + (N-1) cos θ| below which the ratio has no finite value and the base stays, as in mergekit."""


@np.errstate(invalid="ignore")  # what is not finite becomes NaN, in silence
def coefficients(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factor t / N for each of the N task vectors, with t = N cos θ / (1 + (N-1) cos θ).

    cos θ is the mean over the pairs of task vectors; t is not limited to [0, 1].

    Args:
        gram: Inner products of the task vectors, [..., N, N].

    Returns:
        Their factors, [..., N].
    """
    num_models = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    first, second = np.triu_indices(num_models, k=1)
    products = np.maximum(norms[..., first] * norms[..., second], TINY_PRODUCT)
    cosine = np.clip(gram[..., first, second] / products, -1.0, 1.0).mean(axis=-1)
    denominator = 1 + (num_models - 1) * cosine
    singular = np.abs(denominator) < SINGULAR
    t = np.where(singular, 0.0, num_models * cosine / np.where(singular, 1.0, denominator))
    return np.repeat(t[..., None] / num_models, num_models, axis=-1)


def combination(inputs: CombinationInputs) -> Combination:
    """One ratio t for the whole tensor, or one per row."""
    if inputs.shared["filter_wise"]:
        return sum_of_others(inputs, coefficients(inputs.gram(GramKind.TASK_VECTORS, Axis.ROWS)), Axis.ROWS)
    gram = inputs.gram(GramKind.TASK_VECTORS, Axis.WHOLE)
    return sum_of_others(inputs, _known(gram.tobytes(), len(gram)))


@functools.lru_cache(maxsize=1 << 14)
def _known(gram: bytes, size: int) -> NDArray[np.float64]:
    """The coefficients of inner products that are the same for every candidate."""
    return coefficients(np.frombuffer(gram).reshape(size, size))


def model_stock(inputs: MergeInputs) -> Tensor:
    """θ = t θ_avg + (1-t) θ_base, θ_avg the average of the other models."""
    return merge_by(inputs, combination)


METHOD = Method(
    name="model_stock",
    title="Model Stock",
    summary="Moves from the base towards the average of the models, as far as their angles suggest.",
    reference="https://arxiv.org/abs/2403.19522",
    parameters=(
        Parameter(
            name="filter_wise",
            kind="bool",
            scope=Scope.RECIPE,
            default=False,
            description="Take one ratio per row, not one for the whole tensor.",
        ),
    ),
    base=BasePolicy.REQUIRED,
    min_others=2,
    formula=model_stock,
    combination=combination,
    concept="Fine-tuned models lie on a shell around an ideal one; from the angles between their task vectors "
    "follows how far along the line from the base to their average it comes closest. The more they agree, the "
    "further the result moves.",
    when="For several fine-tuned versions of one base, on the same or on related data; there is nothing to tune.",
)
