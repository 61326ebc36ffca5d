"""Checkpoint tensor -> where it lies inside a live transformers model.

A loaded model may hold its weights in other pieces and under other names than its checkpoint: transformers
stacks the experts of Mixtral into one parameter, renames modules, and adds a prefix that some checkpoints
lack. When it saves, it undoes what it did. `live_targets` lets it undo that for the parameters themselves,
without a copy, so that every tensor of the checkpoint becomes a view of a live parameter.

    live parameters ── revert_weight_conversion ──► name in the checkpoint -> view of a live parameter

The views together reach every element of every parameter exactly once, or there is an error.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from evomerge.errors import CheckpointError, Fault
from evomerge.merge.plan import MAX_FAULTS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Address, shape and strides: equal for two names of one live weight, as of a tied head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveTensor:
    """A parameter or buffer of a live model.

    Attributes:
        names: What the model calls it; a tied head is called two things.
        tensor: The parameter or buffer itself.
        parts: Name of a tensor in a checkpoint -> view of what it fills; several names may lead to one view.
    """

    names: tuple[str, ...]
    tensor: Tensor
    parts: Mapping[str, Tensor]


def live_tensors(model: PreTrainedModel) -> list[LiveTensor]:
    """Return every parameter and stored buffer that is not empty, with the checkpoint's tensors that fill it.

    Raises:
        CheckpointError: As `live_targets`.
    """
    targets = live_targets(model)
    wholes: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel():
            wholes.setdefault(tensor.data_ptr(), ([], tensor))[0].append(name)
    starts = sorted(wholes)
    parts: dict[int, dict[str, Tensor]] = {start: {} for start in starts}
    for name, target in targets.items():
        if target.numel():
            parts[starts[bisect_right(starts, target.data_ptr()) - 1]][name] = target
    return [
        LiveTensor(names=tuple(names), tensor=tensor, parts=parts[start])
        for start, (names, tensor) in wholes.items()
    ]


def live_targets(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return name in a checkpoint -> view of the live parameter or buffer that holds it.

    Names with and without the prefix of the base model, both of which transformers loads, lead to one view.

    Raises:
        CheckpointError: A tensor of the checkpoint is no view of a live parameter, or the views miss elements
            or reach some twice.
    """
    live = {name: tensor.data for name, tensor in model.state_dict(keep_vars=True).items()}
    targets = _as_saved(model, live)
    _check_cover(live, targets)
    prefix = f"{model.base_model_prefix}."
    for name in sorted(targets):
        if name.startswith(prefix):
            targets.setdefault(name.removeprefix(prefix), targets[name])
    return targets


def place(tensor: Tensor) -> Place:
    """Where a live tensor lies in memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _as_saved(model: PreTrainedModel, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo transformers' conversions as on saving, but in views: nothing is copied to be contiguous."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.core_model_loading import revert_weight_conversion

    class WithoutCopies(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))

    with WithoutCopies():
        return dict(revert_weight_conversion(model, dict(live)))


def _check_cover(live: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Make sure that the targets divide the live tensors among them.

    Raises:
        CheckpointError: They do not; names the tensors.
    """
    by_place = {place(tensor): (name, tensor) for name, tensor in live.items() if tensor.numel()}
    wholes = sorted(by_place.values(), key=lambda item: item[1].data_ptr())
    faults = [
        Fault(path=name, reason=f"shares memory with {other}, but as another tensor")
        for (other, before), (name, after) in pairwise(wholes)
        if _end(before) > after.data_ptr()
    ]
    starts = [whole.data_ptr() for _, whole in wholes]
    parts: list[dict[Place, tuple[str, Tensor]]] = [{} for _ in wholes]
    for name, target in targets.items():
        if target.numel():
            index = bisect_right(starts, target.data_ptr()) - 1
            if index < 0 or _end(target) > _end(wholes[index][1]):
                reason = (
                    "transformers computes it from parameters of the loaded model and keeps it in none, so a "
                    "merge cannot be written there"
                )
                faults.append(Fault(path=name, reason=reason))
            else:
                parts[index].setdefault(place(target), (name, target))
    for (name, whole), own in zip(wholes, parts, strict=True):
        if own.keys() != {place(whole)} and not _divide(whole, [part for _, part in own.values()]):
            found = ", ".join(part for part, _ in own.values()) or "none"
            reason = (
                f"a checkpoint's tensors must reach each of its elements once; those that reach it: {found}"
            )
            faults.append(Fault(path=name, reason=reason))
    if faults:
        raise CheckpointError(faults[:MAX_FAULTS])


def _divide(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether each element of the whole lies in one part, and no part reaches beyond."""
    import torch

    def marks_of(tensor: Tensor) -> Tensor:
        first = (tensor.data_ptr() - whole.data_ptr()) // whole.itemsize
        return marks.as_strided(tensor.shape, tensor.stride(), first)

    marks = torch.zeros((_end(whole) - whole.data_ptr()) // whole.itemsize, dtype=torch.uint8)
    for part in parts:
        marks_of(part).fill_(1)
    # All are marked, by parts that have no more elements than the whole: none is missing, none shared.
    return sum(part.numel() for part in parts) == whole.numel() and bool(marks_of(whole).all())


def _end(tensor: Tensor) -> int:
    """Address of the first byte after a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.itemsize
