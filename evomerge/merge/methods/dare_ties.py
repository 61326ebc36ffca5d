"""DARE-TIES: drop random elements of the task vectors, rescale the rest, merge them with TIES' sign election.

Yu et al., "Language Models are Super Mario", 2023, https://arxiv.org/abs/2311.03099; sign election from
Yadav et al., "TIES-Merging", 2023, https://arxiv.org/abs/2306.01708. This is the method that the paper
"Evolutionary Optimization of Model Merging Recipes" searches with.
"""

from __future__ import annotations

from evomerge.merge.methods.base import BasePolicy, Method, TaskVectorInputs
from evomerge.merge.methods.dare_linear import DIFFERENCES, PARAMETERS, drop_and_rescale
from evomerge.merge.methods.task_vectors import TaskVectorSum, merge_task_vectors


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """Drop and rescale as in DARE, then elect and merge as in TIES."""
    return TaskVectorSum(
        terms=drop_and_rescale(inputs),
        elect=True,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="dare_ties",
    title="DARE-TIES",
    summary="Drops random elements of the task vectors, rescales the rest, merges what agrees in sign.",
    reference="https://arxiv.org/abs/2311.03099",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    random=True,
    elementwise=True,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept="DARE's random dropping followed by TIES' election of a sign per element.",
    when="As TIES, when models differ little from the base; the method of Sakana's evolutionary merges.",
    differences=DIFFERENCES,
)
