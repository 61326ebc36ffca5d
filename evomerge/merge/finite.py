"""Says why a merged tensor holds NaN or infinity, which is looked for only once it does."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.execute import is_finite, why_made_infinite
from evomerge.merge.memory import GRAIN
from evomerge.merge.plan import TensorPlan


def not_finite(plan: TensorPlan, sources: Mapping[str, Checkpoint]) -> CheckpointError:
    """A source holds it already, or the merge made it."""
    for model, name in plan.inputs:
        flat = sources[model].tensor(name).view(-1)
        for first in range(0, flat.numel(), GRAIN):
            piece = flat[first : first + GRAIN]
            if not is_finite(piece):
                element = first + int((~piece.isfinite()).nonzero()[0])
                value = float(flat[element])
                reason = (
                    f"the merged tensor holds NaN or infinity, as {model} does: element {element} of {name} in "
                    f"{sources[model].tensors[name].file} is {value}; use an undamaged copy of the model, or "
                    "leave it out"
                )
                return CheckpointError(Fault(path=plan.name, reason=reason))
    return CheckpointError(Fault(path=plan.name, reason=why_made_infinite(plan)))
