"""Carries out one tensor plan: scalar work first, then one pass over the elements.

    plan + bank ── prepare_tensor ──► PreparedTensor ── write(run of elements) ──► out
                   statistics, coefficients             kernel, or the formula in torch

`compute` does so for all tensors of a candidate; what the loops for the CPU can do, from the `frame`s of its tensors.
Everything is computed in float32 and rounded once, to the plan's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from evomerge.errors import CheckpointError, Fault
from evomerge.merge.bank import Bank, SourceLine, Statistics, TensorSource
from evomerge.merge.frame import arrays_of, elements_of, ranks_of
from evomerge.merge.kernels import cpu, cpu_arrays
from evomerge.merge.kernels.cpu_arrays import Check, prepared_at
from evomerge.merge.kernels.threads import spread
from evomerge.merge.methods import MergeInputs
from evomerge.merge.methods.base import CombinationInputs, TaskVectorInputs
from evomerge.merge.plan import TensorPlan

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from evomerge.merge.kernels.reference import Elements, Line, Operation

Item = TypeVar("Item")

PIECE = 1 << 16
"""Elements that an elementwise formula is given at once: its temporaries stay in the processor's cache."""

PART = 1 << 22
"""Elements that a thread computes at once, in one tensor or in several."""

__all__ = [
    "PIECE",
    "Bank",
    "PreparedTensor",
    "TensorSource",
    "compute",
    "is_finite",
    "merge_tensor",
    "operation_of",
    "prepare_tensor",
    "why_made_infinite",
    "why_not_finite",
]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PreparedTensor:
    """An output tensor that can be computed.

    Attributes:
        plan: What to do.
        lines: Its inputs, in the types they are stored in.
        operation: What a kernel carries out, or None for a formula in torch and for copies.
        ranks: Position of an input -> ranks of its elements, where the operation asks for them.
    """

    plan: TensorPlan
    lines: Sequence[SourceLine]
    operation: Operation | None
    ranks: Mapping[int, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """Its inputs, flat."""
        return [line.tensor for line in self.lines]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.plan.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the result."""
        import torch

        return self.lines[0].tensor.dtype if self.plan.dtype is None else getattr(torch, self.plan.dtype)

    @property
    def divisible(self) -> bool:
        """Whether runs of elements may be computed one by one; else only the whole."""
        return self.plan.dtype is None or self.operation is not None or self.plan.method.elementwise

    @property
    def workspace_bytes(self) -> int:
        """Memory needed beside the inputs and the output, at most."""
        if self.plan.dtype is None:
            return 0
        count = min(PIECE, self.numel) if self.divisible else self.numel
        ranks = sum(ranks.nbytes for ranks in self.ranks.values())
        unscaled = 4 * count if self.plan.rescale is not None else 0
        return 4 * count * (3 * len(self.lines) + 4) + ranks + unscaled

    def write(self, out: Tensor, first: int = 0) -> bool:
        """Compute the elements first <= e < first + out.numel().

        Args:
            out: Flat and contiguous, of the result's type; written.
            first: Position of the first element.

        Returns:
            Whether all of them are finite.
        """
        end = first + out.numel()
        if self.plan.dtype is None:
            out.copy_(_copied(self.plan, [tensor[first:end] for tensor in self.tensors]))
            return is_finite(out)
        if self.plan.rescale is not None:
            return self._write_rescaled(out, first, *self.plan.rescale)
        return self._write_merged(out, first)

    def _write_rescaled(self, out: Tensor, first: int, factor: float, offset: float) -> bool:
        import torch

        step = PIECE if self.divisible else max(1, out.numel())
        for start in range(0, out.numel(), step):
            piece = out[start : start + step]
            merged = torch.empty_like(piece, dtype=torch.float32)
            self._write_merged(merged, first + start)
            # Not offset + w, which would round away the last places of a small w.
            merged.mul_(factor)
            if offset:
                merged.add_((factor - 1) * offset)
            piece.copy_(merged)
        return is_finite(out)

    def _write_merged(self, out: Tensor, first: int) -> bool:
        if self.operation is None:
            return self._write_formula(out, first)
        native = self._native(out, first)
        if native is not None:
            return cpu_arrays.run(self.operation, native, cpu.flat(out))
        elements = self._elements(self.tensors, self.ranks, first, out.numel())
        return _kernel(out)(self.operation, elements, out)

    def _native(self, out: Tensor, first: int) -> Elements[NDArray[Any]] | None:
        """The inputs of a run of elements as the loops for the CPU take them, if they know all types."""
        arrays = arrays_of(self.lines, out)
        if arrays is None:
            return None
        ranks = {source: cpu.flat(line) for source, line in self.ranks.items()}
        return self._elements(arrays, ranks, first, out.numel())

    def _elements(
        self, inputs: Sequence[Line], ranks: Mapping[int, Line], first: int, count: int
    ) -> Elements[Line]:
        return elements_of(self.plan, inputs, ranks).part(first, first + count)

    def _write_formula(self, out: Tensor, first: int) -> bool:
        if not self.plan.method.elementwise:
            assert first == 0, "only the whole tensor can be computed"
            assert out.numel() == self.numel, "only the whole tensor can be computed"
            whole = [tensor.view(self.plan.shape) for tensor in self.tensors]
            out.copy_(self._merged(whole, first=0).view(-1))
        else:
            for start in range(0, out.numel(), PIECE):
                end = min(start + PIECE, out.numel())
                piece = [tensor[first + start : first + end] for tensor in self.tensors]
                out[start:end] = self._merged(piece, first=first + start)
        return is_finite(out)

    def _merged(self, tensors: Sequence[Tensor], *, first: int) -> Tensor:
        inputs = MergeInputs(
            name=self.plan.name,
            tensors=[tensor.float() for tensor in tensors],
            base=self.plan.base,
            shared=self.plan.shared,
            values=self.plan.values,
            seed=self.plan.seed,
            first=first,
        )
        return self.plan.method.formula(inputs)


def prepare_tensor(plan: TensorPlan, bank: Bank) -> PreparedTensor:
    """Do the scalar work of one tensor; statistics it needs and that are not known yet read the inputs once.

    Args:
        plan: What to do.
        bank: The sources.
    """
    lines = [bank.line(key) for key in plan.inputs]
    operation = operation_of(plan, bank) if plan.dtype is not None else None
    ranks = {} if operation is None else ranks_of(plan, operation.ranked, bank)
    return PreparedTensor(plan=plan, lines=lines, operation=operation, ranks=ranks)


def compute(wanted: Iterable[tuple[TensorPlan, Tensor]], bank: Bank) -> PreparedTensor | None:
    """Compute many tensors, on the CPU several at once.

    Args:
        wanted: Plan and where the result goes, flat, contiguous and of the plan's type.
        bank: The sources.

    Returns:
        The first tensor whose result is not finite, if there is one; those after it may be unwritten.
    """
    if bank.device != "cpu":
        # One after the other: what is prepared may hold copies of its inputs that the bank has no room for.
        return _run([_Step(out.numel(), partial(_whole, plan, out, bank)) for plan, out in wanted])
    batches = _batches(_all_steps(list(wanted), bank), lambda step: step.size)
    return next((flawed for flawed in spread(_run, batches) if flawed is not None), None)


def _all_steps(wanted: Sequence[tuple[TensorPlan, Tensor]], bank: Bank) -> list[_Step]:
    """Prepare all tensors; in several threads from the first one on whose statistics had to be computed.

    Without that, threads would only get in each other's way: preparing is Python's work. Under a budget, tensors come
    into memory one by one.
    """
    steps: list[_Step] = []
    known, begun = bank.num_computed, 0
    while begun < len(wanted) and (bank.num_computed == known or bank.budget is not None):
        steps += _steps(*wanted[begun], bank)
        begun += 1
    groups = _batches(wanted[begun:], lambda item: item[1].numel())
    for found in spread(lambda group: [step for item in group for step in _steps(*item, bank)], groups):
        steps += found
    return steps


class _Step(NamedTuple):
    """A tensor to compute, or a run of its elements.

    Attributes:
        size: Number of elements.
        work: Computes them; gives the tensor if they are not finite.
    """

    size: int
    work: Callable[[], PreparedTensor | None]


def _steps(plan: TensorPlan, out: Tensor, bank: Bank) -> Iterator[_Step]:
    """Prepare a tensor, and leave as little as possible of its computation to Python.

    Done for all tensors before the first is computed: Python holds up the threads that compute, and finds its data
    gone from the caches after them. A large tensor is computed in several steps, which threads can share.
    """
    count = out.numel()
    if bank.budget is not None and count <= PART:
        # Preparing takes it into memory, which has no room for all.
        yield _Step(count, partial(_whole, plan, out, bank))
        return
    if bank.budget is None and plan.dtype is not None and plan.rescale is None:
        frame = bank.frame(plan, out, part=PART)
        operation = operation_of(plan, bank) if frame.is_native else None
        if operation is not None:
            for run in frame.runs(operation):
                yield _Step(run.size, partial(_run_of, plan, bank, prepared_at(operation, run.places)))
            return
    prepared = prepare_tensor(plan, bank)
    size = PART if prepared.divisible else max(1, count)
    for first in range(0, max(1, count), size):
        piece = out[first : first + size]
        yield _Step(piece.numel(), partial(_run_of, plan, bank, partial(prepared.write, piece, first)))


def _whole(plan: TensorPlan, out: Tensor, bank: Bank) -> PreparedTensor | None:
    prepared = prepare_tensor(plan, bank)
    return None if prepared.write(out) else prepared


def _run_of(plan: TensorPlan, bank: Bank, check: Check) -> PreparedTensor | None:
    return None if check() else prepare_tensor(plan, bank)


def _run(steps: Sequence[_Step]) -> PreparedTensor | None:
    return next((flawed for step in steps if (flawed := step.work()) is not None), None)


def _batches(items: Sequence[Item], size: Callable[[Item], int]) -> list[list[Item]]:
    """Many small tensors at once, as waking a thread takes as long as computing one."""
    batches: list[list[Item]] = []
    room = 0
    for item in items:
        if not batches or size(item) > room:
            batches.append([])
            room = PART
        batches[-1].append(item)
        room -= size(item)
    return batches


def merge_tensor(plan: TensorPlan, sources: Bank | Mapping[str, TensorSource]) -> Tensor:
    """Merge one tensor.

    Args:
        plan: What to do.
        sources: The bank, or model as the recipe names it -> its tensors.

    Returns:
        A new tensor of the plan's shape and type.

    Raises:
        CheckpointError: A tensor that is copied rather than merged differs between the models.
    """
    import torch

    bank = sources if isinstance(sources, Bank) else Bank(sources)
    prepared = prepare_tensor(plan, bank)
    merged = torch.empty(plan.shape, dtype=prepared.dtype, device=bank.device)
    prepared.write(merged.view(-1))
    return merged


def is_finite(tensor: Tensor) -> bool:
    """Whether a merged tensor holds no NaN and no infinity."""
    # An 8-bit float, which is only ever copied, has no arithmetic.
    return not tensor.is_floating_point() or tensor.itemsize == 1 or bool(tensor.isfinite().all())


def why_not_finite(prepared: PreparedTensor) -> str:
    """Why a merged tensor holds NaN or infinity: one of its sources does, or the merge overflowed."""
    for (model, name), tensor in zip(prepared.plan.inputs, prepared.tensors, strict=True):
        for first in range(0, tensor.numel(), PIECE):
            if not is_finite(tensor[first : first + PIECE]):
                return (
                    f"the merged tensor holds NaN or infinity, as {name} of {model} does; use an undamaged copy "
                    "of the model, or leave it out"
                )
    return why_made_infinite(prepared.plan)


def why_made_infinite(plan: TensorPlan) -> str:
    """Why a merged tensor holds NaN or infinity that no source has."""
    what = "the merged tensor holds NaN or infinity though the sources do not"
    weights = [values["weight"] for values in plan.values if "weight" in values]
    if plan.shared.get("normalize") and weights and abs(math.fsum(weights)) < 1e-12:
        named = ", ".join(f"{weight:g}" for weight in weights)
        return f"{what}: it is divided by the sum of the weights {named}, which is 0"
    return f"{what}: the merge overflowed {plan.dtype}; use a type of more range, or smaller parameters"


def operation_of(plan: TensorPlan, statistics: Statistics) -> Operation | None:
    """What a kernel carries out for a tensor that is merged, or None if its method has a formula only."""
    method, keys = plan.method, plan.inputs
    if method.combination is not None:
        return method.combination(
            CombinationInputs(
                name=plan.name,
                base=plan.base,
                num_inputs=len(keys),
                shared=plan.shared,
                values=plan.values,
                gram=lambda kind, axis: statistics.gram(keys, plan.base, kind, axis),
            )
        )
    if method.task_vectors is not None:
        assert plan.base is not None
        base = keys[plan.base]
        return method.task_vectors(
            TaskVectorInputs(
                name=plan.name,
                shape=plan.shape,
                others=[index for index in range(len(keys)) if index != plan.base],
                shared=plan.shared,
                values=plan.values,
                histogram=lambda source: statistics.histogram(keys[source], base),
            )
        )
    return None


def _kernel(out: Tensor) -> Callable[[Operation, Elements[Tensor], Tensor], bool]:
    """What carries out an operation on the device of `out`."""
    from evomerge.merge.kernels import gpu, reference

    if out.device.type == "cpu":
        return cpu.run
    return gpu.run if out.device.type == "cuda" and gpu.usable() else reference.run


def _copied(plan: TensorPlan, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    for (model, name), tensor in zip(plan.inputs, tensors, strict=True):
        if tensor.dtype != first.dtype or not _same_bits(tensor, first):
            reason = (
                f"{name} is of type {tensor.dtype} and differs between the models; only equal ones are copied"
            )
            raise CheckpointError(Fault(path=model, reason=reason))
    return first


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    # 8-bit floats cannot be compared as they are.
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
