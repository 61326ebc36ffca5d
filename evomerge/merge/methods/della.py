"""DELLA: drop elements at random, small ones more often, rescale the rest, elect signs.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024,
https://arxiv.org/abs/2406.11617
"""

from __future__ import annotations

import math

from evomerge.errors import ConfigurationError, Fault
from evomerge.merge.methods.base import BasePolicy, Method, Parameter, Scope, TaskVectorInputs
from evomerge.merge.methods.task_vectors import (
    Keep,
    Ranked,
    TaskVectorSum,
    Term,
    merge_task_vectors,
    parameters,
    terms,
)

EPSILON = Parameter(
    name="epsilon",
    kind="float",
    scope=Scope.NON_BASE,
    default=0.15,
    low=0.0,
    high=0.5,
    description="Half the spread of the chances: from density - epsilon to density + epsilon.",
)
DENSITY = "Mean chance of an element of the task vector to be kept."
PARAMETERS = parameters(normalize=True, density=DENSITY, rescale=True, extra=(EPSILON,))
DIFFERENCES = (
    "Masks come from the seeded counter hash. A kept element is divided by its own chance, the paper's rule; "
    "mergekit scales by the ratio of the L1 norms before and after. Rows run along the last dimension of any "
    "tensor, where mergekit ranks tensors of three and more dimensions along the second; a row of one element "
    "has the middle chance, where mergekit divides by zero."
)


def magprune(inputs: TaskVectorInputs) -> tuple[Term, ...]:
    """Chances grow with the rank r of the magnitude within its row of n: d - ε + 2 ε r / (n - 1).

    Raises:
        ConfigurationError: A chance would not lie between 0 and 1.
    """

    def sample(source: int) -> tuple[Keep, float]:
        density, epsilon = inputs.values[source]["density"], inputs.values[source]["epsilon"]
        if density >= 1 or math.prod(inputs.shape) == 0:
            return None, 1.0
        if not (density - epsilon > 0 and density + epsilon < 1):
            reason = (
                f"{inputs.name}: expected density - epsilon > 0 and density + epsilon < 1, got density "
                f"{density:g} and epsilon {epsilon:g}; choose a smaller epsilon"
            )
            raise ConfigurationError(Fault(path="parameters.epsilon", reason=reason))
        keep = Ranked(lowest=density - epsilon, highest=density + epsilon, rescale=inputs.shared["rescale"])
        return keep, 1.0

    return terms(inputs, sample)


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """Drop, elect, fuse: section 3 of the paper."""
    return TaskVectorSum(
        terms=magprune(inputs),
        elect=True,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="della",
    title="DELLA",
    summary="Drops elements of the task vectors at random, small ones more often, merges what agrees in sign.",
    reference="https://arxiv.org/abs/2406.11617",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    random=True,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept=(
        "Between DARE and TIES: elements are dropped at random, but the larger one is within its row the "
        "likelier it stays; what stays is divided by its chance."
    ),
    when="Where DARE loses too many of the large changes.",
    differences=DIFFERENCES,
)
