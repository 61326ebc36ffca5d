"""The table of search spaces and how a space is read from YAML."""

from __future__ import annotations

from dataclasses import dataclass

from evomerge.errors import ConfigurationError, nearest
from evomerge.spaces.base import SearchSpace, SourceModels
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.parameter_settings import ParameterSpaceSettings
from evomerge.yaml_file import Document, validate


@dataclass(frozen=True, kw_only=True)
class SpaceType:
    """One kind of search space: its schema, its class, and what it is."""

    settings: type[ParameterSpaceSettings]
    space: type[ParameterSpace]
    summary: str


SPACES: dict[str, SpaceType] = {
    "parameter": SpaceType(
        settings=ParameterSpaceSettings,
        space=ParameterSpace,
        summary="The numbers of a merge method per source model, tensor group and depth.",
    ),
}


def read_space(document: Document) -> ParameterSpaceSettings:
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
    return SPACES[settings.type].space(settings, sources, document)


__all__ = ["SPACES", "SearchSpace", "SourceModels", "build_space", "read_space"]
