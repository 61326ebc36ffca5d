"""SLERP: from the base to one other model along the arc between them.

Ken Shoemake, "Animating rotation with quaternion curves", 1985, https://doi.org/10.1145/325165.325242;
https://en.wikipedia.org/wiki/Slerp
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method, Parameter, Scope

if TYPE_CHECKING:
    from torch import Tensor

COLLINEAR = 0.9995
"""|cosine| beyond which the arc is taken as straight, as in mergekit."""
TINY_NORM = 1e-8
"""Norm below which a tensor has no direction and is not normalised, as in mergekit."""


def coefficients(t: float, *, dot: float, norm_0: float, norm_1: float) -> tuple[float, float]:
    """Factors of v_0 and v_1 from their inner product and norms.

    Args:
        t: 0 gives v_0, 1 gives v_1.
        dot: Inner product of v_0 and v_1.
        norm_0: Euclidean norm of v_0.
        norm_1: Euclidean norm of v_1.
    """
    scale_0 = norm_0 if norm_0 > TINY_NORM else 1.0
    scale_1 = norm_1 if norm_1 > TINY_NORM else 1.0
    cosine = min(1.0, max(-1.0, dot / scale_0 / scale_1))
    if abs(cosine) > COLLINEAR:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def slerp(inputs: MergeInputs) -> Tensor:
    """θ = [sin((1-t)φ) θ_0 + sin(tφ) θ_1] / sin φ, with φ the angle between the whole tensors."""
    import torch

    (other,) = inputs.others
    v_0, v_1 = inputs.base_tensor, inputs.tensors[other]
    flat_0, flat_1 = v_0.flatten(), v_1.flatten()
    dot = torch.dot(flat_0.double(), flat_1.double()).item()
    norm_0 = torch.linalg.vector_norm(flat_0, dtype=torch.float64).item()
    norm_1 = torch.linalg.vector_norm(flat_1, dtype=torch.float64).item()
    c_0, c_1 = coefficients(inputs.shared["t"], dot=dot, norm_0=norm_0, norm_1=norm_1)
    return (v_0 * c_0).add_(v_1, alpha=c_1)


METHOD = Method(
    name="slerp",
    title="SLERP",
    summary="Spherical interpolation between the base and one other model.",
    reference="https://doi.org/10.1145/325165.325242",
    parameters=(
        Parameter(
            name="t",
            kind="float",
            scope=Scope.RECIPE,
            required=True,
            description="Position on the arc: 0 is the base, 1 the other model.",
        ),
    ),
    base=BasePolicy.REQUIRED,
    min_models=2,
    max_models=2,
    formula=slerp,
)
