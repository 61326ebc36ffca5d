"""The weights of a source as layer views share them: held once, in the form of the live model.

A live parameter that is one stored tensor of the same type is that tensor, a view of the mapped file. Any other,
such as experts that transformers holds in one parameter, or weights of another type, is converted once.

    checkpoint ── load_like ──► layers as modules ── hold ──► SourceLayer
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError, Fault
from evomerge.merge.bank import Bank
from evomerge.merge.layer_stack import LayerStack
from evomerge.merge.layout import layout_of
from evomerge.merge.live_mapping import LiveTensor
from evomerge.merge.plan import MAX_FAULTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module, Parameter
    from transformers import PreTrainedConfig, PreTrainedModel

Region = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides and first element of a part of a tensor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """What a live tensor looks like, without its values.

    Attributes:
        names: What the module that holds it calls it.
        whole: The region that is the tensor itself.
        dtype: Its type.
        parts: Name of a tensor in a checkpoint -> the region that it fills.
    """

    names: tuple[str, ...]
    whole: Region
    dtype: torch.dtype
    parts: Mapping[str, Region]

    @classmethod
    def of(cls, live: LiveTensor) -> Form:
        """The form of a live tensor."""
        return cls(
            names=live.names,
            whole=_region(live.tensor, live.tensor),
            dtype=live.tensor.dtype,
            parts={name: _region(live.tensor, part) for name, part in live.parts.items()},
        )

    def faults(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fault]:
        """What keeps tensors from filling it.

        Args:
            shapes: Name of a part -> shape of the tensor that is to fill it.
        """
        reached = {self.parts[name] for name in shapes}
        for name, region in self.parts.items():
            if region not in reached:
                yield Fault(path=name, reason="no tensor of the recipe reaches this parameter")
                reached.add(region)
        for name, found in shapes.items():
            expected = self.parts[name][0]
            if found != expected:
                reason = f"merged shape {list(found)}, the loaded model's is {list(expected)}"
                yield Fault(path=name, reason=reason)


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """The values of a live tensor.

    Attributes:
        form: Its form.
        parameter: The values.
        regions: Name of a tensor in the source -> the region that it fills.
    """

    form: Form
    parameter: Parameter
    regions: Mapping[str, Region]
    _largest: dict[str, float] = field(default_factory=dict)

    def largest(self, name: str) -> float:
        """Largest magnitude in the region that a tensor fills, NaN if it holds one; read once."""
        if name not in self._largest:
            self._largest[name] = _largest(self.parameter.data.as_strided(*self.regions[name]))
        return self._largest[name]

    @property
    def flawed(self) -> str | None:
        """The first tensor that is not finite, or None."""
        return next((name for name in self.regions if not math.isfinite(self.largest(name))), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceLayer:
    """A layer of a source.

    Attributes:
        module: The layer with the source's weights; never run itself, only the pattern of views.
        tensors: Name of a tensor in the checkpoint -> what it is held in.
    """

    module: Module
    tensors: Mapping[str, Held]

    @cached_property
    def flawed(self) -> str | None:
        """The first of its tensors that is not finite, or None; the first use reads all of them."""
        found = (held.flawed for held in dict.fromkeys(self.tensors.values()))
        return next((name for name in found if name is not None), None)


class Source:
    """A source model on a path.

    Args:
        name: What recipes call it.
        loaded: It, loaded as `load_like` does.
        checkpoint: Its checkpoint.
        bank: Where its tensors are.
        rounding: The type that a recipe rounds weights to, or None to leave them in the stored one.

    Attributes:
        config: The config that its layers refer to.
        layers: Its layers.
        names: All tensors of its layers.
        prefix: What stands before a layer's number in the tensors' names.

    Raises:
        CheckpointError: Its layers do not fit the live model.
    """

    def __init__(
        self,
        name: str,
        loaded: PreTrainedModel,
        checkpoint: Checkpoint,
        bank: Bank,
        rounding: torch.dtype | None,
    ) -> None:
        self.config: PreTrainedConfig = loaded.config
        stack = LayerStack(loaded)
        _, tensors = stack.tensors()
        layout = layout_of(checkpoint)
        faults: list[Fault] = []
        self.layers: list[SourceLayer] = []
        for number, (module, lives) in enumerate(zip(stack.layers, tensors, strict=True)):
            wanted = {role.name for role in layout[number].values()}
            found: dict[str, Held] = {}
            for form in map(Form.of, lives):
                filled = [part for part in form.parts if part in wanted]
                wanted.difference_update(filled)
                wrong = list(form.faults({part: checkpoint.tensors[part].shape for part in filled}))
                faults += wrong
                if not wrong:
                    held = hold(form, {part: part for part in filled}, name, checkpoint, bank, rounding)
                    put(*owner_of(module, form.names[0]), held.parameter)
                    found |= dict.fromkeys(filled, held)
            reason = "the loaded model has no parameter of this name"
            faults += [Fault(path=tensor, reason=reason) for tensor in sorted(wanted)]
            self.layers.append(SourceLayer(module=module.to(bank.device), tensors=found))
        if faults:
            of_model = [Fault(path=f"{name}: {fault.path}", reason=fault.reason) for fault in faults]
            raise CheckpointError(of_model[:MAX_FAULTS])
        self.names = frozenset(tensor for layer in self.layers for tensor in layer.tensors)
        self.prefix = next(iter(layout[0].values())).template.partition("{}")[0]


def hold(
    form: Form,
    filled: Mapping[str, str],
    model: str,
    checkpoint: Checkpoint,
    bank: Bank,
    rounding: torch.dtype | None,
) -> Held:
    """Bring tensors of a source into the form of a live tensor.

    Args:
        form: The form.
        filled: Name of each part -> the tensor to fill it.
        model: What recipes call the source.
        checkpoint: The source.
        bank: Its tensors on the live model's device.
        rounding: The type that weights are rounded to first, or None.
    """
    import torch

    regions = {tensor: form.parts[part] for part, tensor in filled.items()}
    sole = next(iter(regions))
    if regions == {sole: form.whole} and _fits(checkpoint.tensor(sole), form.dtype, rounding):
        values = bank.tensor((model, sole))
    else:
        shape, stride, _ = form.whole
        values = torch.empty_strided(shape, stride, dtype=form.dtype)
        for tensor, region in regions.items():
            stored = checkpoint.tensor(tensor)
            rounded = stored.to(rounding) if rounding is not None and stored.is_floating_point() else stored
            values.as_strided(*region).copy_(rounded)
        values = values.to(bank.device)
    return Held(form=form, parameter=torch.nn.Parameter(values, requires_grad=False), regions=regions)


def owner_of(root: Module, name: str) -> tuple[Module, str]:
    """The module that holds a parameter or buffer, and what it calls it."""
    path, _, attribute = name.rpartition(".")
    return root.get_submodule(path), attribute


def put(owner: Module, attribute: str, parameter: Parameter) -> None:
    """Make this a parameter or buffer of a module, without a copy."""
    if attribute in owner._parameters:
        owner._parameters[attribute] = parameter
    else:
        owner._buffers[attribute] = parameter.data


def _fits(stored: Tensor, dtype: torch.dtype, rounding: torch.dtype | None) -> bool:
    """Whether a stored tensor is what the live one is to hold, so that it can be used as it is."""
    import torch

    if stored.dtype != dtype or rounding is None or not stored.is_floating_point():
        return stored.dtype == dtype
    return torch.promote_types(dtype, rounding) == rounding


def _region(whole: Tensor, part: Tensor) -> Region:
    first = (part.data_ptr() - whole.data_ptr()) // whole.itemsize
    return tuple(part.shape), tuple(part.stride()), first


def _largest(tensor: Tensor) -> float:
    import torch

    # An 8-bit float has no arithmetic.
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        return 0.0
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))
