"""TIES: trim task vectors, elect a sign per element, merge what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023,
https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

import math

from evomerge.merge.methods.base import BasePolicy, Method, TaskVectorInputs
from evomerge.merge.methods.task_vectors import Keep, TaskVectorSum, merge_task_vectors, parameters, terms


def task_vectors(inputs: TaskVectorInputs) -> TaskVectorSum:
    """Trim, elect, merge: sections 4.1 to 4.3 of the paper.

    Trimming keeps the k = max(1, ⌊d E⌋) elements of largest magnitude out of E. Among elements as large as
    the threshold, which are many when weights are stored in bfloat16, the counter hash picks.
    """
    size = math.prod(inputs.shape)

    def trim(source: int) -> tuple[Keep, float]:
        density = inputs.values[source]["density"]
        if density >= 1 or size == 0:
            return None, 1.0
        histogram, kept = inputs.histogram(source), max(1, int(density * size))
        rescale = histogram.rescale(size - kept, size) if inputs.shared["rescale"] else 1.0
        return histogram.largest(kept), rescale

    return TaskVectorSum(
        terms=terms(inputs, trim),
        elect=True,
        normalize=inputs.shared["normalize"],
        scale=inputs.shared["lambda"],
    )


METHOD = Method(
    name="ties",
    title="TIES",
    summary="Trims task vectors to their largest elements, elects a sign per element, merges what agrees.",
    reference="https://arxiv.org/abs/2306.01708",
    parameters=parameters(
        normalize=True, density="Share of the task vector's elements to keep, largest first.", rescale=False
    ),
    base=BasePolicy.REQUIRED,
    formula=merge_task_vectors(task_vectors),
    task_vectors=task_vectors,
    concept=(
        "Small changes are noise and are dropped; where models would move a weight in opposite directions, "
        "the direction with the larger weighted sum wins and only the models that agree with it count."
    ),
    when="Several fine-tuned models of one base that interfere with each other; densities of 0.2 to 0.7.",
    differences=(
        "The threshold is exact to 1/512 octave; of the elements in the bin at the threshold the seeded hash "
        "picks as many as the density asks for, where mergekit takes whichever its sort puts first."
    ),
)
