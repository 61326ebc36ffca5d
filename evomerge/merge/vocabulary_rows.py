"""Tensors with one row per token, given the rows that an output vocabulary asks for.

A model whose rows must change is seen through `AlignedCheckpoint`, which has the interface of the checkpoint
it stands for: planning reads its shapes, merging its tensors, and neither knows of vocabularies. What a row
is made of is decided in `vocabulary.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evomerge.checkpoints.decoder import text_config
from evomerge.checkpoints.modules import DEFAULT, TEXT_DECODER, shared_template
from evomerge.checkpoints.reader import DTYPES, Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.layout import decoder_of, modules_of, tied_heads
from evomerge.merge.plan import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_SIZE = "vocab_size"

RowId = tuple[str, int]
"""A model and the number of one of its rows."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tensors of a model that have one row per token.

    Attributes:
        num_rows: Their number of rows: the model's vocabulary size, which may be larger than the number of
            its tokens.
        names: What a tensor is called in all models of its kind -> its name in this one.
        embeddings: What tokens are looked up in, as all models call it -> the axis of its rows.
        heads: The output head's weight or bias, likewise -> the axis of its rows.
        copies: Output head -> embedding, by their names, for stored heads that the model ties to it.
    """

    num_rows: int
    names: Mapping[str, str]
    embeddings: Mapping[str, int]
    heads: Mapping[str, int]
    copies: Mapping[str, str]

    @property
    def axes(self) -> dict[str, int]:
        """Either, as all models call it -> the axis of its rows."""
        return {**self.embeddings, **self.heads}


def vocabulary_of(name: str, checkpoint: Checkpoint) -> Vocabulary:
    """Find the input embedding and the output head, with its bias.

    Args:
        name: The model as the recipe names it.
        checkpoint: The model.

    Raises:
        CheckpointError: The config does not state the size of the vocabulary, or no embedding has it.
    """
    try:
        decoder = decoder_of(checkpoint)
        copies = tied_heads(checkpoint)
        modules = modules_of(checkpoint)
    except ValueError as error:
        raise CheckpointError(Fault(path=name, reason=str(error))) from None
    if decoder is None:
        reason = f"has no language model by itself whose tokens could be told, only {', '.join(modules)}"
        raise CheckpointError(Fault(path=name, reason=reason))
    module = DEFAULT if DEFAULT in modules else TEXT_DECODER
    size = text_config(checkpoint.config).get(VOCABULARY_SIZE)
    shapes = {
        tensor: checkpoint.tensors[tensor].shape for tensor in (*decoder.token_embeddings, *decoder.head)
    }
    names = {shared_template(module, tensor): tensor for tensor, shape in shapes.items() if size in shape}
    axes = {key: shapes[tensor].index(size) for key, tensor in names.items()}
    embeddings = {key: axis for key, axis in axes.items() if names[key] in decoder.token_embeddings}
    if not embeddings or type(size) is not int:
        found = ", ".join(f"{tensor} {list(shape)}" for tensor, shape in shapes.items())
        reason = f"expected {VOCABULARY_SIZE} to be the number of rows of the embedding, got {size!r}; "
        raise CheckpointError(Fault(path=f"{name}: config.json", reason=f"{reason}found {found}"))
    return Vocabulary(
        num_rows=size,
        names=names,
        embeddings=embeddings,
        heads={key: axis for key, axis in axes.items() if names[key] in decoder.head},
        copies={head: embedding for head, embedding in copies.items() if embedding in names.values()},
    )


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """What the rows of one output tensor of one model are.

    Attributes:
        num_rows: How many there are; rows that are neither own nor given are the mean of those that are.
        own: Output row -> row of the model's own tensor.
        given: Output row -> the rows that it is the mean of; zero if there are none.
    """

    num_rows: int
    own: Mapping[int, int]
    given: Mapping[int, tuple[RowId, ...]]

    @property
    def has_means(self) -> bool:
        """Whether a row is computed rather than copied."""
        return len(self.own) + len(self.given) < self.num_rows or any(
            len(parts) > 1 for parts in self.given.values()
        )

    def keeps(self, num_rows: int) -> bool:
        """Whether the plan leaves a tensor of that many rows as it is."""
        return (
            self.num_rows == num_rows == len(self.own)
            and not self.given
            and all(new == old for new, old in self.own.items())
        )


@dataclass(frozen=True, kw_only=True)
class AlignedTensor:
    """A tensor of an `AlignedCheckpoint`.

    Attributes:
        name: The tensor's name.
        axis: Its axis of rows.
        rows: Its rows.
        others: Model -> its tensor of that kind, and the axis of its rows.
    """

    name: str
    axis: int
    rows: RowPlan
    others: Mapping[str, tuple[str, int]]


class AlignedCheckpoint(Checkpoint):
    """A model whose embedding and head follow another vocabulary; everything else is the model's own.

    Args:
        inner: The model.
        aligned: Name of a tensor -> what it is made of; several names may share one entry.
        peers: Every model that rows are taken from.
        exact: Compute means in float32 and keep them so, instead of in the type of the rows.
    """

    def __init__(
        self,
        inner: Checkpoint,
        aligned: Mapping[str, AlignedTensor],
        peers: Mapping[str, Checkpoint],
        *,
        exact: bool,
    ) -> None:
        self._inner = inner
        self._aligned = dict(aligned)
        self._peers = dict(peers)
        self._exact = exact
        self._made: dict[str, Tensor] = {}
        tensors = dict(inner.tensors)
        for name, made in aligned.items():
            shape = list(inner.tensors[made.name].shape)
            shape[made.axis] = made.rows.num_rows
            dtype = self._dtype(made)
            size = math.prod(shape) * DTYPES[dtype].itemsize
            tensors[name] = replace(tensors[name], dtype=dtype, shape=tuple(shape), begin=0, end=size)
        super().__init__(
            folder=inner.folder, config=inner.config, tensors=tensors, files=inner.files, stamps=inner._stamps
        )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; one that is aligned is made on first use and kept. Never write to it.

        Raises:
            CheckpointError: See `Checkpoint.tensor`.
        """
        made = self._aligned.get(name)
        if made is None:
            return self._inner.tensor(name)
        if made.name not in self._made:
            self._made[made.name] = self._make(made)
        return self._made[made.name]

    def prefetch(self, name: str, first: int = 0, count: int | None = None) -> None:
        """As `Checkpoint.prefetch`; nothing for an aligned tensor, which is no part of a file."""
        if name not in self._aligned:
            self._inner.prefetch(name, first, count)

    def release(self, name: str, first: int = 0, count: int | None = None) -> None:
        """As `Checkpoint.release`; an aligned tensor is kept."""
        if name not in self._aligned:
            self._inner.release(name, first, count)

    def content_hash(self) -> str:
        """Return the SHA-256, in hex, of the model's content, what is aligned, and where rows come from.

        Raises:
            CheckpointError: A file cannot be read.
        """
        digest = hashlib.sha256(f"{self._inner.content_hash()}\n{self._exact}\n".encode())
        for name, made in sorted(self._aligned.items()):
            plan = made.rows
            used = sorted({model for parts in plan.given.values() for model, _ in parts})
            hashes = {model: self._peers[model].content_hash() for model in used}
            given = [[row, [[hashes[model], at] for model, at in parts]] for row, parts in plan.given.items()]
            digest.update(json.dumps([name, made.name, plan.num_rows, [*plan.own.items()], given]).encode())
        return digest.hexdigest()

    def _dtype(self, made: AlignedTensor) -> str:
        """The type, as safetensors names it, that holds the rows without loss."""
        models = sorted({model for parts in made.rows.given.values() for model, _ in parts})
        dtypes = {self._peers[model].tensors[made.others[model][0]].dtype for model in models}
        dtypes.add(self._inner.tensors[made.name].dtype)
        for dtype in sorted(dtypes - TORCH_DTYPES.keys()):
            path = f"{self._inner.folder}: {made.name}"
            reason = f"is of type {dtype}; rows of embeddings are taken from {', '.join(TORCH_DTYPES)} only"
            raise CheckpointError(Fault(path=path, reason=reason))
        if self._exact and made.rows.has_means:
            dtypes.add("F32")
        if len(dtypes) == 1:
            return dtypes.pop()
        return "F64" if "F64" in dtypes else "F32"

    def _make(self, made: AlignedTensor) -> Tensor:
        import torch

        plan = made.rows
        old = self._inner.tensor(made.name).movedim(made.axis, 0)
        dtype = getattr(torch, TORCH_DTYPES[self.tensors[made.name].dtype])
        new = torch.zeros((plan.num_rows, *old.shape[1:]), dtype=dtype)
        new[_index(plan.own)] = old[_index(plan.own.values())].to(dtype)
        self._inner.release(made.name)
        if plan.given:
            new[_index(plan.given)] = self._given(made, old.shape[1:]).to(dtype)
        filled = torch.zeros(plan.num_rows, dtype=torch.bool)
        filled[_index([*plan.own, *plan.given])] = True
        if not filled.all():
            count = int(filled.sum())
            # Most vocabularies have no gaps, and need no copy of their rows.
            rows = new[:count] if bool(filled[:count].all()) else new[filled]
            mean = rows.mean(dim=0, dtype=torch.float32 if dtype != torch.float64 else dtype)
            new[~filled] = mean.to(dtype)
        return new.movedim(0, made.axis).contiguous()

    def _given(self, made: AlignedTensor, shape: tuple[int, ...]) -> Tensor:
        """The given rows, in float32."""
        import torch

        given = list(made.rows.given.values())
        rows = torch.zeros((len(given), *shape))
        places: dict[str, list[tuple[int, int]]] = {}
        for place, parts in enumerate(given):
            for model, row in parts:
                places.setdefault(model, []).append((place, row))
        for model, found in places.items():
            name, axis = made.others[model]
            theirs = self._peers[model].tensor(name).movedim(axis, 0)
            rows[_index(place for place, _ in found)] += theirs[_index(row for _, row in found)].float()
            self._peers[model].release(name)
        counts = torch.tensor([max(1, len(parts)) for parts in given])
        return rows / counts.reshape(-1, *(1 for _ in shape))


def _index(rows: Iterable[int]) -> Tensor:
    import torch

    return torch.tensor(list(rows), dtype=torch.long)
