"""How much of a streamed merge is in memory at once: the writer's buffers and the chunk being merged.

Counted are the buffers, what of the sources the chunk needs, and what its method computes with. Not counted are
the process itself, and pages that are mapped for a method's statistics once: they are the file's own, and the
system takes them back when it needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.checkpoints.reader import DTYPES, Checkpoint, TensorInfo
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.stream import NUM_BUFFERS
from evomerge.checkpoints.writer import BUFFER_BYTES
from evomerge.errors import ConfigurationError
from evomerge.merge.execute import PreparedTensor
from evomerge.merge.plan import TensorPlan

GRAIN = 1 << 16
"""Chunks are whole multiples of this many elements, as the methods work in such pieces."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How much memory holds what.

    Attributes:
        budget: Bytes for weights in memory, or None for no limit.
        buffer_bytes: Size of one of the writer's buffers.
        held_bytes: What stays in memory all the time, such as embeddings brought to another vocabulary.
    """

    budget: int | None
    buffer_bytes: int
    held_bytes: int

    @classmethod
    def plan(
        cls, plans: Sequence[TensorPlan], sources: Mapping[str, Checkpoint], budget: int | None
    ) -> Memory:
        """Choose the size of the buffers.

        Raises:
            ConfigurationError: The budget is too small for any merge of these models.
        """
        used = {(model, name) for plan in plans for model, name in plan.inputs}
        infos = [sources[model].tensors[name] for model, name in sorted(used)]
        held = sum(info.end - info.begin for info in infos if is_made(info))
        if budget is None:
            return cls(budget=None, buffer_bytes=BUFFER_BYTES, held_bytes=held)
        widest = max(
            (bytes_per_element(plan, sources) / spec_of(plan, sources).stored.itemsize for plan in plans),
            default=1.0,
        )
        smallest = GRAIN * 8
        needed = held + int(smallest * (NUM_BUFFERS + widest))
        if budget < needed:
            raise ConfigurationError(
                f"--memory-budget: these models need at least {needed} bytes, got {budget}"
            )
        affordable = int((budget - held) / 2 / (NUM_BUFFERS + widest))
        buffer_bytes = max(smallest, min(BUFFER_BYTES, affordable // smallest * smallest))
        return cls(budget=budget, buffer_bytes=buffer_bytes, held_bytes=held)

    def chunk(self, prepared: PreparedTensor) -> int:
        """Elements that are merged at once."""
        return self.elements(prepared.dtype.itemsize) if prepared.divisible else max(1, prepared.numel)

    def elements(self, itemsize: int) -> int:
        """Elements of a divisible tensor that are merged at once, of that many bytes each."""
        count = self.buffer_bytes // itemsize
        return max(GRAIN, count // GRAIN * GRAIN) if count >= GRAIN else count

    def needed(self, plan: TensorPlan, prepared: PreparedTensor, sources: Mapping[str, Checkpoint]) -> int:
        """Bytes in memory while a tensor is merged."""
        count = min(self.chunk(prepared), prepared.numel)
        whole = count * prepared.dtype.itemsize
        own = whole if whole > self.buffer_bytes else 0
        inputs = count * bytes_per_element(plan, sources)
        return self.held_bytes + NUM_BUFFERS * self.buffer_bytes + own + inputs + prepared.workspace_bytes

    def check(self, plan: TensorPlan, prepared: PreparedTensor, sources: Mapping[str, Checkpoint]) -> None:
        """Refuse a tensor that needs more than the budget.

        Raises:
            ConfigurationError: Names the tensor, its need and the budget.
        """
        needed = self.needed(plan, prepared, sources)
        if self.budget is not None and needed > self.budget:
            why = "" if prepared.divisible else f", as {plan.method.name} merges it in one piece"
            raise ConfigurationError(
                f"--memory-budget: tensor '{plan.name}' needs {needed} bytes in memory{why}; the budget is "
                f"{self.budget}; raise it"
            )


def is_made(info: TensorInfo) -> bool:
    """Whether a tensor lies in no file: in a file a header comes first."""
    return info.begin == 0


def spec_of(plan: TensorPlan, sources: Mapping[str, Checkpoint]) -> TensorSpec:
    """What is written of an output tensor."""
    model, name = plan.inputs[0]
    stored = DTYPES[sources[model].tensors[name].dtype].torch_name
    return TensorSpec(name=plan.name, dtype=plan.dtype or stored, shape=plan.shape)


def bytes_per_element(plan: TensorPlan, sources: Mapping[str, Checkpoint]) -> int:
    """Bytes of all inputs together that are mapped for one element."""
    infos = (sources[model].tensors[name] for model, name in set(plan.inputs))
    return sum(DTYPES[info.dtype].itemsize for info in infos if not is_made(info))
