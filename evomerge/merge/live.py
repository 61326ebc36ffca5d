"""Recipe -> weights inside a live transformers model.

The model is loaded once and stays; every candidate overwrites all of its parameters in place. A parameter
that no tensor of the recipe reaches, or a tensor that no parameter takes, is an error, so that no candidate
can be scored on weights left over from another. `live_mapping` finds where each tensor lies. Candidates may
differ in their number of layers: `live_layers` keeps as many as the deepest needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.bank import Bank, TensorSource
from evomerge.merge.execute import PreparedTensor, compute, is_finite, prepare_tensor, why_not_finite
from evomerge.merge.live_layers import LayerPool
from evomerge.merge.live_mapping import Place, live_targets, place
from evomerge.merge.plan import MergePlan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class NonFiniteWeightsError(Exception):
    """A candidate's merged tensor holds NaN or infinity; names the tensor."""


class LiveModel:
    """A resident model whose parameters are overwritten by every candidate.

    Args:
        model: The transformers model; its parameters are changed in place and never reallocated.
        checkpoints: Model as recipes name it -> its checkpoint; without them, recipes must have the layers that
            the model has.

    Attributes:
        model: That model.
        targets: Name of a tensor in a checkpoint -> view of the live parameter that holds it.

    Raises:
        CheckpointError: The model holds its weights in a form that a checkpoint cannot be written to.
    """

    def __init__(self, model: PreTrainedModel, checkpoints: Mapping[str, Checkpoint] | None = None) -> None:
        self.model = model
        self._pool = None if checkpoints is None else LayerPool(model, checkpoints)
        self._layers: tuple[tuple[str, int], ...] | None = None
        self._aim(live_targets(model))

    def write(self, plan: MergePlan, sources: Bank | Mapping[str, TensorSource]) -> None:
        """Merge every tensor of the plan into the model.

        Args:
            plan: The planned recipe.
            sources: The bank, on the model's device; or model as the recipe names it -> its tensors.

        Raises:
            CheckpointError: The plan and the model do not cover each other.
            NonFiniteWeightsError: A merged tensor is not finite; the model then holds a partial candidate.
        """
        if self._pool is not None and plan.layers != self._layers:
            self._layers = None
            targets = self._pool.arrange(plan)
            if targets is not None:
                self._aim(targets)
            self._layers = plan.layers
        self._check_cover(plan)
        bank = sources if isinstance(sources, Bank) else Bank(sources)
        direct: list[tuple[TensorPlan, Tensor]] = []
        others: list[tuple[TensorPlan, Tensor, str]] = []
        written: dict[Place, str] = {}
        for tensor_plan in plan.tensors:
            target = self.targets[tensor_plan.name]
            first = written.setdefault(place(target), tensor_plan.name)
            if first == tensor_plan.name and _takes(target, tensor_plan):
                direct.append((tensor_plan, target.view(-1)))
            else:
                others.append((tensor_plan, target, first))
        flawed = compute(direct, bank)
        if flawed is not None:
            raise NonFiniteWeightsError(f"{flawed.plan.name}: {why_not_finite(flawed)}")
        for tensor_plan, target, first in others:
            prepared = prepare_tensor(tensor_plan, bank)
            if not self._write_through(prepared, target, first):
                raise NonFiniteWeightsError(f"{tensor_plan.name}: {why_not_finite(prepared)}")

    def _write_through(self, prepared: PreparedTensor, target: Tensor, other: str) -> bool:
        """By way of a tensor of the plan's type, which may hold less or more than the model's.

        Args:
            prepared: What to compute.
            target: Where it belongs.
            other: The tensor that was written there first; another name means that the two are tied.
        """
        import torch

        merged = torch.empty(prepared.plan.shape, dtype=prepared.dtype, device=target.device)
        prepared.write(merged.view(-1))
        converted = merged.to(target.dtype)
        if other == prepared.plan.name:
            target.copy_(converted)
        elif not target.equal(converted):
            reason = f"the model ties it to {other}, but the recipe merges the two differently"
            raise CheckpointError(Fault(path=prepared.plan.name, reason=reason))
        return is_finite(converted)

    def poison(self) -> None:
        """Overwrite every floating-point parameter with NaN; what a candidate leaves unwritten then shows."""
        spare = () if self._pool is None else self._pool.tensors()
        for tensor in (*self.targets.values(), *spare):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))

    def _aim(self, targets: Mapping[str, Tensor]) -> None:
        self.targets: Mapping[str, Tensor] = MappingProxyType(dict(targets))
        self._names_by_place: dict[Place, list[str]] = {}
        for name, tensor in targets.items():
            self._names_by_place.setdefault(place(tensor), []).append(name)

    def _check_cover(self, plan: MergePlan) -> None:
        faults = []
        reached: set[Place] = set()
        for tensor_plan in plan.tensors:
            target = self.targets.get(tensor_plan.name)
            if target is None:
                reason = "the loaded model has no parameter of this name"
                faults.append(Fault(path=tensor_plan.name, reason=reason))
            elif tuple(target.shape) != tensor_plan.shape:
                reason = f"merged shape {list(tensor_plan.shape)}, the loaded model's is {list(target.shape)}"
                faults.append(Fault(path=tensor_plan.name, reason=reason))
            else:
                reached.add(place(target))
        for where, names in self._names_by_place.items():
            if where not in reached:
                faults.append(Fault(path=names[0], reason="no tensor of the recipe reaches this parameter"))
        if faults:
            raise CheckpointError(faults)


def _takes(target: Tensor, plan: TensorPlan) -> bool:
    """Whether results can be written straight into the target; tensors that are copied may change their type."""
    return target.is_contiguous() and str(target.dtype) == f"torch.{plan.dtype}"
