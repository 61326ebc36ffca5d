"""Lets code of the user's run beside a live model, and sees to it that it leaves everything as it was."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.errors import ChangedModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@contextlib.contextmanager
def settled(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every generator of random numbers starts at seed 0 and no gradients are taken.

    What was before is restored behind: generators, gradients, the default type.
    """
    import torch

    device = model.device
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generators that others may use
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.set_grad_enabled(False)
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextlib.contextmanager
def unchanged(model: PreTrainedModel, who: str) -> Iterator[None]:
    """Lend a model; its mode and its generation settings are restored.

    Args:
        model: The model.
        who: Borrows it, for messages.

    Raises:
        ChangedModelError: It came back with other weights or another config.
    """
    modes = [(module, module.training) for module in model.modules()]
    generation = copy.deepcopy(model.generation_config)
    before = _condition(model)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.generation_config = generation
        after = _condition(model)
        changed = [name for name in (*before, *after) if before.get(name) != after.get(name)]
        if changed:
            raise ChangedModelError(
                f"{who} changed the model ({changed[0]}); a function has to leave the model as it found it, so "
                "let it work on a copy"
            )


def _condition(model: PreTrainedModel) -> dict[str, Any]:
    """What must not change, by name: place, shape, type and sum of every tensor, and the config."""
    import torch

    tensors = model.state_dict()
    sums = torch.stack([_sum(tensor) for tensor in tensors.values()]).tolist()
    found: dict[str, Any] = {
        name: (tensor.data_ptr(), tensor.shape, tensor.dtype, total)
        for (name, tensor), total in zip(tensors.items(), sums, strict=True)
    }
    return found | {"its config": model.config.to_dict()}


def _sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bytes as whole numbers, 8 bytes each where that goes."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    width = flat.element_size()
    if flat.numel() * width % 8 == 0 and flat.storage_offset() * width % 8 == 0:
        return flat.view(torch.int64).sum()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return flat.view(whole).sum(dtype=torch.int64)
