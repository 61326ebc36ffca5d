"""What a plan says of a checkpoint."""

from __future__ import annotations

from collections import Counter

from evomerge.checkpoints.reader import DTYPES, Checkpoint
from evomerge.plan.records import ModelEntry
from evomerge.spaces.base import ModelSize
from evomerge.spaces.limits import size_of


def model_entry(name: str, checkpoint: Checkpoint) -> ModelEntry:
    """Describe a model by its headers.

    Args:
        name: What to call it.
        checkpoint: The model.
    """
    size = size_of(checkpoint)
    return ModelEntry(
        name=name,
        parameters=num_parameters(size),
        dtype=dtype_of(checkpoint),
        bytes=checkpoint.nbytes,
        layers=len(size.layers),
    )


def num_parameters(size: ModelSize) -> int:
    """Parameters of a whole model."""
    return size.outside + sum(size.layers)


def dtype_of(checkpoint: Checkpoint) -> str:
    """The type that most bytes of a checkpoint have, as torch names it."""
    count: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        count[info.dtype] += info.end - info.begin
    return DTYPES[count.most_common(1)[0][0]].torch_name
