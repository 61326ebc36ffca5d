"""The table of search spaces and how a space is read from YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ConfigurationError, nearest
from evomerge.spaces.base import SearchSpace, SourceModels
from evomerge.spaces.data_flow import DataFlowSpace
from evomerge.spaces.data_flow_settings import DataFlowSettings, PathSettings
from evomerge.spaces.joint import JointSpace
from evomerge.spaces.joint_settings import JointSettings
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.parameter_settings import ParameterSpaceSettings
from evomerge.yaml_file import Document, StrictRecord, validate


@dataclass(frozen=True, kw_only=True)
class SpaceType:
    """One kind of search space.

    Attributes:
        settings: Its schema.
        space: Its class: fits settings to source models; the document is where faults are located.
        summary: What it is.
        reference: Where it comes from.
        moves_layers: Whether it puts layers in another order and merges none, so that the models may differ in
            their number of layers; its `SourceModels` then have anatomies.
    """

    settings: type[StrictRecord]
    space: Callable[[Any, SourceModels, Document], SearchSpace]
    summary: str
    reference: str
    moves_layers: bool = False


SPACES: dict[str, SpaceType] = {
    "parameter": SpaceType(
        settings=ParameterSpaceSettings,
        space=ParameterSpace,
        summary="The numbers of a merge method per source model, tensor group and depth.",
        reference="https://arxiv.org/abs/2403.13187, section 3.1",
    ),
    "data_flow": SpaceType(
        settings=DataFlowSettings,
        space=DataFlowSpace,
        summary="A path through the layers of the source models, with scales; the weights stay as they are.",
        reference="https://arxiv.org/abs/2403.13187, section 3.2",
        moves_layers=True,
    ),
    "joint": SpaceType(
        settings=JointSettings,
        space=JointSpace,
        summary="The numbers of a merge method and a path through the merged layers, in one genome.",
        reference="https://arxiv.org/abs/2403.13187, sections 3.1 and 3.2 in one search",
    ),
}


def read_space(document: Document) -> StrictRecord:
    """Check a search space file on its own, without knowing the models.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    if not isinstance(document.data, dict):
        raise ConfigurationError(document.fault((), "expected a mapping of keys to values"))
    kind = document.data.get("type")
    if not isinstance(kind, str) or kind not in SPACES:
        reason = f"expected one of {', '.join(SPACES)}, got {kind!r}{nearest(str(kind), SPACES)}"
        raise ConfigurationError(document.fault(("type",), reason))
    return validate(SPACES[kind].settings, document)


def build_space(document: Document, sources: SourceModels) -> SearchSpace:
    """Read a search space file and fit it to the source models.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    settings = read_space(document)
    return SPACES[document.data["type"]].space(settings, sources, document)


def chooses_layers(document: Document) -> bool:
    """Whether the layers of the merged model depend on the genome in a space that `read_space` accepts."""
    return isinstance(read_space(document), PathSettings)


def needs_anatomies(document: Document) -> bool:
    """Whether a search space that `read_space` accepts must know what the layers of the models are made of."""
    settings = read_space(document)
    has_scales = isinstance(settings, PathSettings) and settings.scales != "none"
    return SPACES[document.data["type"]].moves_layers or has_scales


__all__ = [
    "SPACES",
    "SearchSpace",
    "SourceModels",
    "build_space",
    "chooses_layers",
    "needs_anatomies",
    "read_space",
]
