"""The source tensors with their statistics, as merges read them.

On the CPU the tensors are views of the memory-mapped files, so that all processes of a host share one copy
in memory; with a budget, pages beyond it are given back and read again for the next candidate. On another
device they are copied there when first used and stay, as far as the budget reaches; what does not fit is
copied anew for every candidate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from evomerge.merge.histogram import Histogram
from evomerge.merge.methods.base import Axis, GramKind, MergeInputs
from evomerge.merge.statistics import Key, StatisticsStore

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from evomerge.merge.frame import Frame
    from evomerge.merge.plan import TensorPlan

PIECE = 1 << 24
"""Elements whose statistics are computed at once on a GPU, or whose ranks anywhere."""


class TensorSource(Protocol):
    """Anything that hands out a model's tensors by name, such as a `Checkpoint`."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, to be treated as read-only."""
        ...

    def content_hash(self) -> str:
        """Hash of the model's content; asked for only when statistics are kept on disk."""
        ...

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        """Give back the memory of (elements of) a tensor, which stays valid; asked for only with a budget."""
        ...


class Statistics(Protocol):
    """What methods ask to know of source tensors, such as a `Bank`."""

    def histogram(self, source: Key, base: Key, /) -> Histogram:
        """Magnitude histogram of the task vector of a source."""
        ...

    def gram(
        self, tensors: Sequence[Key], base: int | None, kind: GramKind, axis: Axis, /
    ) -> NDArray[np.float64]:
        """Gram matrices; see `Bank.gram`."""
        ...


class SourceLine(NamedTuple):
    """The elements of a source tensor in a row.

    Attributes:
        tensor: Them, flat.
        array: The same memory in the form that the loops for the CPU take, or None if they cannot.
    """

    tensor: Tensor
    array: NDArray[Any] | None


class Bank:
    """Source tensors, and what is known of them.

    Args:
        sources: Model as the recipe names it -> its tensors.
        device: Where merges are computed.
        statistics: Folder to keep statistics in, or None to keep them in memory.
        budget: Bytes of tensors to keep in memory, or None for all. The tensors of one merge are in memory
            together, whatever the budget.
    """

    def __init__(
        self,
        sources: Mapping[str, TensorSource],
        *,
        device: str = "cpu",
        statistics: Path | None = None,
        budget: int | None = None,
    ) -> None:
        self.device = device
        self._sources = sources
        self._store = StatisticsStore(statistics, lambda model: sources[model].content_hash())
        self.budget = budget
        self._resident: dict[Key, Tensor] = {}
        self._resident_bytes = 0
        self._lines: dict[Key, SourceLine] = {}
        self._lock = threading.Lock()
        self._histograms: dict[tuple[Key, Key], Histogram] = {}
        self._grams: dict[tuple[tuple[Key, ...], int | None, GramKind, Axis], NDArray[np.float64]] = {}
        self._ranks: dict[tuple[Key, Key], Tensor] = {}
        self._frames: dict[str, Frame] = {}
        self._last_inputs: dict[str, tuple[Key, ...]] = {}

    @property
    def num_computed(self) -> int:
        """How many statistics were computed or read so far, rather than known."""
        return self._store.num_loaded

    def tensor(self, key: Key) -> Tensor:
        """A source tensor on the bank's device, in the type it is stored in; never write to it."""
        known = self._resident.get(key)
        if known is not None:
            return known
        with self._lock:
            return self._load(key)

    def line(self, key: Key) -> SourceLine:
        """A source tensor's elements; they cost nothing again where tensors stay in the process's memory."""
        known = self._lines.get(key)
        if known is not None:
            return known
        from evomerge.merge.kernels import cpu

        flat = self.tensor(key).reshape(-1).contiguous()
        line = SourceLine(flat, cpu.flat(flat) if cpu.is_native(flat) else None)
        # Under a budget, tensors come and go.
        if self.device == "cpu" and self.budget is None:
            self._lines[key] = line
        return line

    def frame(self, plan: TensorPlan, out: Tensor, *, part: int) -> Frame:
        """What stays of an output tensor from candidate to candidate, if it is the same but for its parameters.

        It is kept once two candidates in a row had the same inputs: where layers move, it would not be used again.

        Args:
            plan: What to do.
            out: Where the result goes, flat.
            part: Elements of a run.
        """
        from evomerge.merge.frame import Frame

        known = self._frames.get(plan.name)
        if known is not None and known.is_of(plan, out):
            return known
        found = Frame(plan, out, self, part=part)
        if self._last_inputs.get(plan.name) == plan.inputs:
            self._frames[plan.name] = found
        self._last_inputs[plan.name] = plan.inputs
        return found

    def _load(self, key: Key) -> Tensor:
        model, name = key
        tensor = self._sources[model].tensor(name)
        if self.device == "cpu":
            if self.budget is not None:
                self._make_room(tensor.nbytes, self.budget)
            self._keep(key, tensor)
            return tensor
        tensor = tensor.to(self.device)
        if self._fits(tensor):
            self._keep(key, tensor)
        return tensor

    def _fits(self, tensor: Tensor) -> bool:
        return self.budget is None or self._resident_bytes + tensor.nbytes <= self.budget

    def _keep(self, key: Key, tensor: Tensor) -> None:
        self._resident[key] = tensor
        self._resident_bytes += tensor.nbytes

    def _make_room(self, nbytes: int, budget: int) -> None:
        """Give back the pages of the tensors that were used first."""
        while self._resident and self._resident_bytes + nbytes > budget:
            model, name = next(iter(self._resident))
            self._resident_bytes -= self._resident.pop((model, name)).nbytes
            self._sources[model].release(name)

    def histogram(self, source: Key, base: Key) -> Histogram:
        """Magnitude histogram of the task vector of a source."""
        known = self._histograms.get((source, base))
        if known is not None:
            return known

        def compute() -> NDArray[Any]:
            if not self._counts_there:
                from evomerge.merge.kernels import cpu

                return cpu.histogram(
                    self._counted(base), self._counted(source), self._releasing([base, source])
                ).table
            return Histogram.of_pieces(self._task_vector(source, base)).table

        found = Histogram(self._store.get("histogram", [source], base, compute))
        self._histograms[source, base] = found
        return found

    def gram(
        self, tensors: Sequence[Key], base: int | None, kind: GramKind, axis: Axis
    ) -> NDArray[np.float64]:
        """Gram matrices; see `GramKind` and `Axis`.

        Args:
            tensors: All inputs, in the recipe's order.
            base: Position of the base among them, or None.
            kind: Whose inner products.
            axis: Along what.
        """
        key = (tuple(tensors), base, kind, axis)
        known = self._grams.get(key)
        if known is not None:
            return known
        origin = base if kind is GramKind.TASK_VECTORS else None
        picked = [key for index, key in enumerate(tensors) if index != origin]

        def compute() -> NDArray[Any]:
            if not self._counts_there and axis is Axis.WHOLE:
                from evomerge.merge.kernels import cpu

                relative_to = None if origin is None else self._counted(tensors[origin])
                return cpu.gram([self._counted(key) for key in picked], relative_to, self._releasing(tensors))
            from evomerge.merge.methods.combination import gram_matrices

            inputs = MergeInputs(
                name="",
                tensors=[self._counted(key) for key in tensors],
                base=base,
                shared={},
                values=(),
                seed=0,
            )
            return gram_matrices(inputs, kind, axis)

        relative_to = None if origin is None else tensors[origin]
        found = self._grams[key] = self._store.get(f"gram, {axis}", picked, relative_to, compute)
        return found

    def ranks(self, source: Key, base: Key) -> Tensor:
        """Ranks of the magnitudes of a task vector within their rows, flat uint16; see `row_ranks`."""
        import torch

        from evomerge.merge.methods.task_vectors import row_ranks

        if (source, base) in self._ranks:
            return self._ranks[source, base]

        def compute() -> NDArray[Any]:
            rows = self._task_vector(source, base)
            pieces = [row_ranks(delta).to(torch.uint16).cpu() for delta in rows]
            ranks: NDArray[np.uint16] = torch.cat(pieces).view(-1).numpy()
            return ranks

        ranks = torch.from_numpy(self._store.get("ranks", [source], base, compute))
        if self.device == "cpu":
            return ranks
        ranks = ranks.to(self.device)
        if self._fits(ranks):
            self._ranks[source, base] = ranks
            self._resident_bytes += ranks.nbytes
        return ranks

    @property
    def _counts_there(self) -> bool:
        """Whether statistics are computed on the bank's device; not every one has 64-bit numbers."""
        return self.device.startswith("cuda")

    def _counted(self, key: Key) -> Tensor:
        """A source tensor where statistics are computed."""
        model, name = key
        there = self.device == "cpu" or self._counts_there
        return self.tensor(key) if there else self._sources[model].tensor(name)

    def _task_vector(self, source: Key, base: Key) -> Iterator[Tensor]:
        """A task vector in float32, some whole rows after the other."""
        from evomerge.merge.methods.combination import vectors

        source_rows, base_rows = (vectors(self._counted(key), Axis.ROWS) for key in (source, base))
        step = max(1, PIECE // max(1, source_rows.shape[1]))
        release = self._releasing([base, source])
        for top in range(0, max(1, len(source_rows)), step):
            yield source_rows[top : top + step].float() - base_rows[top : top + step].float()
            release(top * source_rows.shape[1], step * source_rows.shape[1])

    def _releasing(self, keys: Sequence[Key]) -> Callable[[int, int], None]:
        """What gives back the pages of elements that statistics are done with, if memory is limited."""

        def release(first: int, count: int) -> None:
            if self.budget is not None:
                for model, name in keys:
                    self._sources[model].release(name, first, count)

        return release
