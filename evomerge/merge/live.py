"""Recipe -> weights inside a live transformers model.

The model is loaded once and stays; every candidate overwrites all of its parameters in place. A parameter
that no tensor of the recipe reaches, or a tensor that no parameter takes, is an error, so that no candidate
can be scored on weights left over from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.errors import CheckpointError, Fault
from evomerge.merge.execute import TensorSource, is_finite, merge_tensor
from evomerge.merge.plan import MergePlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class NonFiniteWeightsError(Exception):
    """A candidate's merged tensor holds NaN or infinity; names the tensor."""


class LiveModel:
    """A resident model whose parameters are overwritten by every candidate.

    Args:
        model: The transformers model; its parameters are changed in place and never reallocated.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._targets: dict[str, Tensor] = {
            name: tensor.data for name, tensor in model.state_dict(keep_vars=True).items()
        }
        self._names_by_storage: dict[int, list[str]] = {}
        for name, tensor in self._targets.items():
            self._names_by_storage.setdefault(tensor.data_ptr(), []).append(name)

    def write(self, plan: MergePlan, sources: Mapping[str, TensorSource]) -> None:
        """Merge every tensor of the plan into the model.

        Args:
            plan: The planned recipe.
            sources: Model as the recipe names it -> its tensors.

        Raises:
            CheckpointError: The plan and the model do not cover each other.
            NonFiniteWeightsError: A merged tensor is not finite; the model then holds a partial candidate.
        """
        self._check_cover(plan)
        written: dict[int, str] = {}
        for tensor_plan in plan.tensors:
            name, target = tensor_plan.name, self._targets[tensor_plan.name]
            # In the model's own type, which may hold less than the plan's.
            merged = merge_tensor(tensor_plan, sources).to(target.dtype)
            if not is_finite(merged):
                raise NonFiniteWeightsError(f"{name}: the merged tensor holds NaN or infinity")
            other = written.setdefault(target.data_ptr(), name)
            if other == name:
                target.copy_(merged)
            elif not target.equal(merged.to(target.device)):
                reason = f"the model ties it to {other}, but the recipe merges the two differently"
                raise CheckpointError(Fault(path=name, reason=reason))

    def poison(self) -> None:
        """Overwrite every floating-point parameter with NaN; what a candidate leaves unwritten then shows."""
        for tensor in self._targets.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))

    def _check_cover(self, plan: MergePlan) -> None:
        faults = []
        reached: set[int] = set()
        for tensor_plan in plan.tensors:
            target = self._targets.get(tensor_plan.name)
            if target is None:
                reason = "the loaded model has no parameter of this name"
                faults.append(Fault(path=tensor_plan.name, reason=reason))
            elif tuple(target.shape) != tensor_plan.shape:
                reason = f"merged shape {list(tensor_plan.shape)}, the loaded model's is {list(target.shape)}"
                faults.append(Fault(path=tensor_plan.name, reason=reason))
            else:
                reached.add(target.data_ptr())
        for storage, names in self._names_by_storage.items():
            if storage not in reached:
                faults.append(Fault(path=names[0], reason="no tensor of the recipe reaches this parameter"))
        if faults:
            raise CheckpointError(faults)
