"""Task arithmetic: add weighted task vectors to the base.

Ilharco et al., "Editing Models with Task Arithmetic", 2022, https://arxiv.org/abs/2212.04089
"""

from __future__ import annotations

from evomerge.merge.methods.base import BasePolicy, Method, TaskVectorInputs
from evomerge.merge.methods.task_vectors import TaskVectorSum, merge_task_vectors, parameters, terms


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """θ = θ_base + λ Σ w_i δ_i, the sum divided by Σ w_i when `normalize`."""
    return TaskVectorSum(
        terms=terms(inputs),
        elect=False,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="task_arithmetic",
    title="Task arithmetic",
    summary="Adds weighted task vectors to the base.",
    reference="https://arxiv.org/abs/2212.04089",
    parameters=parameters(normalize=False),
    base=BasePolicy.REQUIRED,
    elementwise=True,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept=(
        "What fine-tuning changed, the difference of a model from its base, is a vector that can be scaled, "
        "added to others and added to the base. A negative weight takes a skill away."
    ),
    when="The first thing to try with fine-tuned models of one base; one weight per model often goes far.",
)
