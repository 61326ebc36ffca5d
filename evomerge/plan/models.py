"""What a plan says of a checkpoint."""

from __future__ import annotations

import math
from collections import Counter

from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER
from evomerge.checkpoints.reader import DTYPES, Checkpoint
from evomerge.merge.layout import depth_of, modules_of
from evomerge.plan.records import ModelEntry
from evomerge.spaces.base import ModelSize


def model_entry(name: str, checkpoint: Checkpoint) -> ModelEntry:
    """Describe a model by its headers.

    Args:
        name: What to call it.
        checkpoint: The model.
    """
    modules = modules_of(checkpoint)
    roles = [role for layout in modules.values() for layer in layout.values() for role in layer.values()]
    main = [layout for module, layout in modules.items() if module in (DEFAULT, TEXT_DECODER)]
    return ModelEntry(
        name=name,
        parameters=sum(math.prod(checkpoint.tensors[role.name].shape) for role in roles),
        dtype=dtype_of(checkpoint),
        bytes=checkpoint.nbytes,
        layers=sum(depth_of(layout) for layout in main or modules.values()),
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
