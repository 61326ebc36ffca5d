"""Model Breadcrumbs with TIES' sign election.

Davari and Belilovsky, "Model Breadcrumbs", 2023, https://arxiv.org/abs/2312.06795; sign election from
Yadav et al., "TIES-Merging", 2023, https://arxiv.org/abs/2306.01708.
"""

from __future__ import annotations

from evomerge.merge.methods.base import BasePolicy, Method, TaskVectorInputs
from evomerge.merge.methods.breadcrumbs import DIFFERENCES, PARAMETERS, leave_out_both_ends
from evomerge.merge.methods.task_vectors import TaskVectorSum, merge_task_vectors


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """Mask as in Model Breadcrumbs, then elect and merge as in TIES."""
    return TaskVectorSum(
        terms=leave_out_both_ends(inputs),
        elect=True,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="breadcrumbs_ties",
    title="Model Breadcrumbs with TIES",
    summary="Leaves out the smallest and largest elements of the task vectors, merges what agrees in sign.",
    reference="https://arxiv.org/abs/2312.06795",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept="The masks of Model Breadcrumbs followed by TIES' election of a sign per element.",
    when="As Model Breadcrumbs, when the models pull in opposite directions.",
    differences=DIFFERENCES,
)
