"""Watches a model at work: time inside its forward passes, finite logits, generations that were cut off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from evomerge.fitness.base import NonFiniteLogitsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Watch:
    """Times forward passes and checks their logits; whoever generates counts here too.

    Attributes:
        seconds: Time inside forward passes since the last reset.
        generations: Generated sequences.
        truncated: Those of them that ran into the token limit.
        output_tokens: Their length in tokens.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.seconds = 0.0
        self.generations = 0
        self.truncated = 0
        self.output_tokens = 0

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Watch a model inside the context.

        Raises:
            NonFiniteLogitsError: From within a forward pass.
        """
        import torch

        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            # Code of the user's may ask for a tuple; with labels the loss comes first, which is finite or not, too.
            logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
            if logits.is_cuda:
                torch.cuda.current_stream(logits.device).synchronize()
            self.seconds += time.perf_counter() - started
            # Both pass on NaN, in a thirtieth of the time of isfinite on all logits.
            low, high = torch.aminmax(logits)
            if not (low.isfinite() and high.isfinite()):
                raise NonFiniteLogitsError("the model's logits hold NaN or infinity")

        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
