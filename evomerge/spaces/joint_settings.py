"""What a search space file of type `joint` may say; `joint.py` gives it its meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from evomerge.spaces.data_flow_settings import IndicatorSettings, PathSettings
from evomerge.spaces.method_settings import MethodSettings
from evomerge.yaml_file import StrictRecord


class DepthBlocks(StrictRecord):
    """How numbers vary over depth.

    Attributes:
        blocks: Number of blocks of consecutive layers, each with its own numbers, as in the parameter space.
    """

    blocks: Annotated[int, Field(ge=1)]


class JointSettings(MethodSettings, PathSettings):
    """A search space file of type `joint`: the numbers of a merge method, and a path through the merged layers.

    Attributes:
        type: `joint`.
        depth: Variation of the numbers over depth; none by default.
        indicators: Which layers are on the path.
    """

    type: Literal["joint"]
    depth: DepthBlocks | None = None
    indicators: IndicatorSettings = IndicatorSettings()
