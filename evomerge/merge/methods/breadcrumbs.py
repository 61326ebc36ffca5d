"""Model Breadcrumbs: leave out the smallest and the very largest elements of the task vectors.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", 2023,
https://arxiv.org/abs/2312.06795
"""

from __future__ import annotations

import math

from evomerge.merge.methods.base import BasePolicy, Method, Parameter, Scope, TaskVectorInputs
from evomerge.merge.methods.task_vectors import (
    Keep,
    TaskVectorSum,
    Term,
    merge_task_vectors,
    parameters,
    terms,
)

PARAMETERS = parameters(
    normalize=False,
    density="Share of the task vector's elements to keep.",
    rescale=False,
    extra=(
        Parameter(
            name="gamma",
            kind="float",
            scope=Scope.NON_BASE,
            default=0.01,
            low=0.0,
            high=1.0,
            description="Share of the largest elements to leave out, less if the density needs them.",
        ),
    ),
)
DIFFERENCES = (
    "At least one element is kept: mergekit rounds the number kept down, which turns the task vector of a "
    "one-element tensor to zero at any density below 1. Elements at a threshold as in TIES."
)


def leave_out_both_ends(inputs: TaskVectorInputs) -> tuple[Term, ...]:
    """Keep the ranks β <= r < β + k of E elements by magnitude: the masks of section 3.

    k = max(1, ⌊d E⌋) are kept, and ⌊gamma E⌋ of the largest left out, fewer when too few would remain.
    """
    size = math.prod(inputs.shape)

    def mask(source: int) -> tuple[Keep, float]:
        values = inputs.values[source]
        if values["density"] >= 1 or size == 0:
            return None, 1.0
        kept = max(1, int(values["density"] * size))
        smallest = max(0, size - kept - int(values["gamma"] * size))
        histogram, ranks = inputs.histogram(source), (smallest, smallest + kept)
        return histogram.band(*ranks), histogram.rescale(*ranks) if inputs.shared["rescale"] else 1.0

    return terms(inputs, mask)


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """θ = θ_base + λ Σ w_i m_i δ_i."""
    return TaskVectorSum(
        terms=leave_out_both_ends(inputs),
        elect=False,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="breadcrumbs",
    title="Model Breadcrumbs",
    summary="Leaves out the smallest and the largest elements of the task vectors, adds the rest to the base.",
    reference="https://arxiv.org/abs/2312.06795",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept=(
        "Small changes are noise, and the very largest are outliers that hurt the other tasks; what lies "
        "between is kept and added up."
    ),
    when="Many task vectors at once, or task vectors with a few extreme elements.",
    differences=DIFFERENCES,
)
