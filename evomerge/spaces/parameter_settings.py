"""What a search space file of type `parameter` may say; `parameter.py` gives it its meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evomerge.spaces.method_settings import MethodSettings
from evomerge.yaml_file import StrictRecord


class Depth(StrictRecord):
    """How numbers vary over depth.

    Attributes:
        blocks: Number of blocks of consecutive layers, each with its own numbers. Tensors before the layers
            belong to the first block, those behind them to the last.
        smooth: Number of control points, spread evenly from the first layer to the last; layers between
            them are interpolated linearly. Tensors before and behind the layers take the first point, as
            in mergekit's gradients.
    """

    blocks: Annotated[int, Field(ge=1)] | None = None
    smooth: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Depth:
        if (self.blocks is None) == (self.smooth is None):
            raise ValueError("expected exactly one of 'blocks' and 'smooth'")
        return self


class ParameterSpaceSettings(MethodSettings):
    """A search space file of type `parameter`: the numbers of a merge method, and their depth.

    Attributes:
        type: `parameter`.
        depth: Variation over depth; none by default.
    """

    type: Literal["parameter"]
    depth: Depth | None = None
