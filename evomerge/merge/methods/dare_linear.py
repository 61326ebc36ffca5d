"""DARE, linear: drop random elements of the task vectors, rescale the rest, add them to the base.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", 2023,
https://arxiv.org/abs/2311.03099
"""

from __future__ import annotations

from evomerge.merge.methods.base import BasePolicy, Method, TaskVectorInputs
from evomerge.merge.methods.task_vectors import (
    Keep,
    Random,
    TaskVectorSum,
    Term,
    merge_task_vectors,
    parameters,
    terms,
)

PARAMETERS = parameters(
    normalize=False, density="Chance of each element of the task vector to be kept.", rescale=True
)
DIFFERENCES = (
    "Masks come from the seeded counter hash, so a recipe always gives the same weights. Kept elements are "
    "rescaled by 1/density, the paper's rule; mergekit uses the ratio of the L1 norms before and after, which "
    "differs from it by sampling noise."
)


def drop_and_rescale(inputs: TaskVectorInputs) -> tuple[Term, ...]:
    """δ_i m_i / p_i with m_i ~ Bernoulli(p_i): equations 2 to 4 of the paper."""

    def drop(source: int) -> tuple[Keep, float]:
        density = inputs.values[source]["density"]
        if density >= 1:
            return None, 1.0
        keep = Random.share(density)
        if keep.last < 0:
            return keep, 0.0
        return keep, 1 / density if inputs.shared["rescale"] else 1.0

    return terms(inputs, drop)


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """θ = θ_base + λ Σ w_i m_i δ_i / p_i."""
    return TaskVectorSum(
        terms=drop_and_rescale(inputs),
        elect=False,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="dare_linear",
    title="Linear DARE",
    summary="Drops random elements of the task vectors, rescales the rest and adds them to the base.",
    reference="https://arxiv.org/abs/2311.03099",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    random=True,
    elementwise=True,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept=(
        "Most of what fine-tuning changed is redundant: a random share of it can be dropped and the rest "
        "scaled up, after which task vectors overlap, and interfere, less."
    ),
    when="Several fine-tuned models with small changes from one base; densities down to 0.1 can work.",
    differences=DIFFERENCES,
)
