"""Runs operations on tensors on the CPU: in the form of arrays where the loops know their type, else converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.merge.kernels import cpu_arrays, reference
from evomerge.merge.kernels.cpu_arrays import PIECE, Read, in_parallel
from evomerge.merge.kernels.reference import Elements, Operation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from evomerge.merge.histogram import Histogram


def run(operation: Operation, elements: Elements[Tensor], out: Tensor) -> bool:
    """Carry out an operation; see `reference.run`, whose results it gives bit for bit."""
    import torch

    types = {tensor.dtype for tensor in elements.tensors}
    if len(types) == 1 and is_native(elements.tensors[0]) and is_native(out) and out.is_contiguous():
        return cpu_arrays.run(operation, _arrays(elements), flat(out))
    if torch.float64 in types or out.dtype == torch.float64:
        return reference.run(operation, elements, out)
    return in_parallel(lambda part, piece: _run_converted(operation, part, piece), elements, out)


def _run_converted(operation: Operation, elements: Elements[Tensor], out: Tensor) -> bool:
    """Through float32, piece by piece, where the loops do not know a type or types are mixed."""
    import torch

    finite = True
    for start in range(0, elements.count, PIECE):
        part = elements.part(start, min(start + PIECE, elements.count))
        merged = torch.empty(part.count)
        finite &= cpu_arrays.run_part(operation, _arrays(part), flat(merged))
        piece = out[start : start + PIECE]
        piece.copy_(merged)
        finite &= bool(piece.isfinite().all())
    return finite


def _arrays(elements: Elements[Tensor]) -> Elements[NDArray[Any]]:
    """The same elements, in one type."""
    return Elements(
        name=elements.name,
        seed=elements.seed,
        shape=elements.shape,
        first=elements.first,
        tensors=_comparable(elements.tensors),
        base=elements.base,
        ranks={source: flat(ranks) for source, ranks in elements.ranks.items()},
    )


def histogram(base: Tensor, source: Tensor, done: Callable[[int, int], None] | None = None) -> Histogram:
    """Histogram of the task vector of a source; see `Histogram.of`.

    Args:
        base: Tensor of the base.
        source: Tensor of the source.
        done: Called with the position and number of elements that are not looked at again.
    """
    return cpu_arrays.histogram(_reader([base, source]), source.numel(), done=done)


def gram(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    done: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Inner products of N tensors, or of their differences from a base, float64 [N, N].

    Args:
        tensors: The tensors.
        base: The base, or None.
        done: As for `histogram`.
    """
    read = _reader([*tensors, *([] if base is None else [base])])
    around_base = base is not None
    return cpu_arrays.gram(read, tensors[0].numel(), number=len(tensors), around_base=around_base, done=done)


def _reader(tensors: Sequence[Tensor]) -> Read:
    lines = [tensor.reshape(-1) for tensor in tensors]
    return lambda first, end: _comparable([line[first:end] for line in lines])


def _comparable(lines: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Flat tensors in one type that the loops know."""
    native = len({line.dtype for line in lines}) == 1 and is_native(lines[0])
    return [flat((line if native else line.float()).contiguous()) for line in lines]


def is_native(tensor: Tensor) -> bool:
    """Whether the loops know a tensor's type, and it lies where they can read it."""
    import torch

    return tensor.dtype in (torch.bfloat16, torch.float32) and tensor.device.type == "cpu"


def flat(tensor: Tensor) -> NDArray[Any]:
    """A contiguous tensor as the flat array that the loops take: bfloat16 as uint16."""
    import torch

    line = tensor if tensor.ndim == 1 else tensor.view(-1)
    array: NDArray[Any] = (line.view(torch.uint16) if line.itemsize == 2 else line).numpy()
    return array
