"""Runs operations on NVIDIA and AMD GPUs; the kernels themselves are in `gpu_loops`.

Triton comes with torch's builds for these GPUs and is imported only when they are used. Each run of elements
costs one small upload, one launch and one answer, for which the host waits.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.merge.kernels import reference
from evomerge.merge.kernels.cpu_arrays import constants, first_key
from evomerge.merge.kernels.reference import Elements, Operation
from evomerge.merge.methods.base import Axis, Combination
from evomerge.merge.methods.task_vectors import TaskVectorSum

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Elements per program: eight per thread, which are 16 bytes of bfloat16."""
PIECE = 1 << 30
"""Elements per launch, that they are counted in 32 bits; launches end at multiples of it."""
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
_NONE_FINITE = {"float16": 0x477FF000, "bfloat16": 0x7F7F8000, "float32": 0x7F800000}
"""The output's type -> smallest float32 pattern that is not finite in it."""


@functools.cache
def usable() -> bool:
    """Whether Triton is installed and builds kernels here; where it fails to, a warning says why."""
    import torch

    try:
        from evomerge.merge.kernels import gpu_loops  # noqa: F401
    except ImportError:
        return False
    one = torch.ones(1, device="cuda")
    elements = Elements(name="", seed=0, shape=(1,), first=0, tensors=[one], base=None)
    try:
        run(Combination(coefficients=np.ones(1)), elements, torch.empty_like(one))
    except Exception as error:  # whatever a compiler of another project may raise
        warnings.warn(
            f"merges run without compiled kernels, which is slow: Triton is installed but fails here ({error}); "
            "it needs a C compiler and Python's headers",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def run(operation: Operation, elements: Elements[Tensor], out: Tensor) -> bool:
    """Carry out an operation; see `reference.run`, whose results it gives bit for bit."""
    import torch

    types = {tensor.dtype for tensor in (*elements.tensors, out)}
    if not types <= {torch.bfloat16, torch.float16, torch.float32} or not out.is_contiguous():
        return reference.run(operation, elements, out)
    ends = [0, *range(PIECE - elements.first % PIECE, elements.count, PIECE), elements.count]
    # Kernels go to the current device, which need not be that of the tensors; -1, the CPU's, changes nothing.
    with torch.cuda.device(out.get_device()):
        flags = [
            _launch(operation, elements.part(start, end), out[start:end])
            for start, end in itertools.pairwise(ends)
            if start < end
        ]
        return not any(bool(flag) for flag in flags)


def _launch(operation: Operation, elements: Elements[Tensor], out: Tensor) -> Tensor:
    """Start the kernel for one run of elements; the result is not 0 once it has met one that is not finite."""
    if isinstance(operation, Combination):
        return _combine(operation, elements, out)
    if not operation.terms:
        assert elements.base is not None
        unchanged = np.eye(len(elements.tensors))[elements.base]
        return _combine(Combination(coefficients=unchanged), elements, out)
    return _sum_task_vectors(operation, elements, out)


def _sum_task_vectors(stated: TaskVectorSum, elements: Elements[Tensor], out: Tensor) -> Tensor:
    from evomerge.merge.kernels import gpu_loops

    assert elements.base is not None
    c = constants(stated.terms, seed=elements.seed, name=elements.name)
    numbers = [
        [*(int(value) for value in values), *_patterns(term.factor, term.weight)]
        for term, values in zip(stated.terms, c, strict=True)
    ]
    key, first = first_key(elements, elements.first)
    head = [*_patterns(stated.divisor, stated.scale), int(key), int(first), 0]
    table = _table(out, [*head, *itertools.chain(*numbers)])
    # A term that keeps everything beside ranked ones has no ranks, and looks at none.
    ranks = elements.ranks
    anything = next(iter(ranks.values()), None)
    gpu_loops.add_terms[_grid(out)](
        out,
        elements.tensors[elements.base],
        tuple(elements.tensors[term.source] for term in stated.terms),
        tuple(ranks.get(term.source, anything) for term in stated.terms) if ranks else None,
        table,
        out.numel(),
        keep=len(c[0]),
        elect=stated.elect,
        normalize=stated.elect and stated.normalize,
        block=BLOCK,
        **_OPTIONS,
    )
    return table[0]


def _combine(operation: Combination, elements: Elements[Tensor], out: Tensor) -> Tensor:
    import torch

    from evomerge.merge.kernels import gpu_loops

    base = elements.base if operation.around_base else None
    others = [index for index in range(len(elements.tensors)) if index != base]
    c = operation.coefficients.astype(np.float32)[..., others]
    whole = operation.axis is Axis.WHOLE
    length = 1 if whole else reference.num_columns(elements.shape, operation.axis)
    head = [*_patterns(operation.divisor, 1.0), 0, elements.first, length]
    table = _table(out, [*head, *(_patterns(*c) if whole else [])])
    gpu_loops.combine[_grid(out)](
        out,
        None if base is None else elements.tensors[base],
        tuple(elements.tensors[index] for index in others),
        None if whole else torch.from_numpy(np.ascontiguousarray(c)).to(out.device),
        table,
        out.numel(),
        by_row=operation.axis is Axis.ROWS,
        block=BLOCK,
        **_OPTIONS,
    )
    return table[0]


def _table(out: Tensor, numbers: Sequence[int]) -> Tensor:
    """The kernels' numbers on the device of `out`; see `gpu_loops`."""
    import torch

    limit = _NONE_FINITE[str(out.dtype).removeprefix("torch.")]
    return torch.tensor([0, limit, *numbers], dtype=torch.int64, device=out.device)


def _grid(out: Tensor) -> tuple[int]:
    return (-(-out.numel() // BLOCK),)


def _patterns(*numbers: float) -> list[int]:
    """Bit patterns of float32 numbers."""
    patterns: list[int] = np.array(numbers, np.float32).view(np.uint32).tolist()
    return patterns
