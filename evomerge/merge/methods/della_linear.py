"""DELLA without the election of signs.

Deep et al., "DELLA-Merging", 2024, https://arxiv.org/abs/2406.11617
"""

from __future__ import annotations

from evomerge.merge.methods.base import BasePolicy, Method, TaskVectorInputs
from evomerge.merge.methods.della import DENSITY, DIFFERENCES, EPSILON, magprune
from evomerge.merge.methods.task_vectors import TaskVectorSum, merge_task_vectors, parameters


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """Drop as in DELLA, then add."""
    return TaskVectorSum(
        terms=magprune(inputs),
        elect=False,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="della_linear",
    title="Linear DELLA",
    summary="Drops elements of the task vectors at random, small ones more often, adds the rest to the base.",
    reference="https://arxiv.org/abs/2406.11617",
    parameters=parameters(normalize=False, density=DENSITY, rescale=True, extra=(EPSILON,)),
    base=BasePolicy.REQUIRED,
    random=True,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept="DELLA's dropping, the task vectors then simply added.",
    when="As DELLA, when the models rarely disagree in sign.",
    differences=DIFFERENCES,
)
