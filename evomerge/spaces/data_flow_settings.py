"""What a search space file of type `data_flow` may say; `data_flow.py` gives it its meaning.

Only the file itself is checked here. What the models have to say about it is checked when the space is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from evomerge.errors import nearest
from evomerge.spaces.method_settings import Range
from evomerge.spaces.path import Semantics
from evomerge.yaml_file import StrictRecord


class IndicatorSettings(StrictRecord):
    """A number per slot that says whether its layer is on the path.

    Attributes:
        repeats: How often the layers of the models are laid out, one after the other.
        start: Starting value of the layers that the starting path has.
        start_unused: Starting value of all others; `start` with a minus by default, so that they are as far
            from the path as the others are from leaving it.
    """

    repeats: Annotated[int, Field(ge=1)] = 3
    start: Annotated[float, Field(gt=0, le=1)] = 0.2
    start_unused: Annotated[float, Field(ge=-1, le=0)] | None = None


class IndicatorGenome(IndicatorSettings):
    """Indicators over the layers of all models in sequence."""

    type: Literal["indicator"]


class PathGenome(StrictRecord):
    """A choice per slot: skip it, or one of the layers that lie about as deep in their models.

    Attributes:
        type: `path`.
        slots: Number of slots between the first and the last layer; by default as many as the first model has
            layers there.
        window: How many layers up or down from the slot's depth a layer may lie.
    """

    type: Literal["path"]
    slots: Annotated[int, Field(ge=1)] | None = None
    window: Annotated[int, Field(ge=0)] = 2


class BlocksGenome(StrictRecord):
    """Spans of consecutive layers of one model each.

    Attributes:
        type: `blocks`.
        count: Number of spans between the first and the last layer.
        max_length: Most layers of a span; by default twice as many as the longest has at the start.
    """

    type: Literal["blocks"]
    count: Annotated[int, Field(ge=1)]
    max_length: Annotated[int, Field(ge=1)] | None = None


_Bound = Annotated[float, Field(ge=-1e6, le=1e6)]


class _ScaleRange(Range):
    """Where searched scales may lie.

    Attributes:
        low: Smallest scale.
        high: Largest scale.
        start: Where the search starts; 1 leaves everything as it is.
        min_scale: Where a scale must not be 0, one closer to 0 counts as this, with its sign: every scale with
            semantics `stream`, that of the first hop with `branch`.
    """

    low: _Bound
    high: _Bound
    start: _Bound = 1.0
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.01


class HopScaleSettings(_ScaleRange):
    """A scale per slot."""

    type: Literal["hop"]


class MatrixScaleSettings(_ScaleRange):
    """A scale per pair of layers, the one left and the one entered."""

    type: Literal["matrix"]


class NetworkScaleSettings(_ScaleRange):
    """Scales by a small network, whose parameters are searched: the range is theirs.

    Attributes:
        type: `network`.
        hidden: Number of its hidden units.
    """

    type: Literal["network"]
    hidden: Annotated[int, Field(ge=1)] = 4
    low: _Bound = -1.0
    high: _Bound = 1.0
    start: _Bound = 0.0


_GENOMES: Mapping[str, type[StrictRecord]] = {
    "indicator": IndicatorGenome,
    "path": PathGenome,
    "blocks": BlocksGenome,
}
_SCALES: Mapping[str, type[StrictRecord]] = {
    "hop": HopScaleSettings,
    "matrix": MatrixScaleSettings,
    "network": NetworkScaleSettings,
}


def _check_type(value: Any, kinds: Mapping[str, type[StrictRecord]]) -> Any:
    if isinstance(value, StrictRecord):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        found = repr(kind if isinstance(value, dict) else value)
        example = f"such as {{type: {next(iter(kinds))}}}"
        raise ValueError(
            f"expected a mapping {example} whose type is one of {', '.join(kinds)}, got "
            f"{found}{nearest(str(kind), kinds)}"
        )
    return value


def _check_genome(value: Any) -> Any:
    return _check_type(value, _GENOMES)


def _check_scales(value: Any) -> Any:
    return value if value == "none" else _check_type(value, _SCALES)


def _class_name(value: Any) -> str:
    """Name of the record that a checked value is read as; messages leave it out."""
    if isinstance(value, dict):
        return {**_GENOMES, **_SCALES}[value["type"]].__name__
    return "none" if value == "none" else type(value).__name__


GenomeSettings = Annotated[
    Annotated[IndicatorGenome, Tag("IndicatorGenome")]
    | Annotated[PathGenome, Tag("PathGenome")]
    | Annotated[BlocksGenome, Tag("BlocksGenome")],
    Discriminator(_class_name),
    BeforeValidator(_check_genome),
]

ScaleSettings = Annotated[
    Annotated[HopScaleSettings, Tag("HopScaleSettings")]
    | Annotated[MatrixScaleSettings, Tag("MatrixScaleSettings")]
    | Annotated[NetworkScaleSettings, Tag("NetworkScaleSettings")]
    | Annotated[Literal["none"], Tag("none")],
    Discriminator(_class_name),
    BeforeValidator(_check_scales),
]


class PathSettings(StrictRecord):
    """What every space over paths may say beside how a genome stands for a path.

    Attributes:
        scales: Scales of the hops; none by default.
        semantics: What a scale multiplies; see `path.Semantics`.
        max_hops: Most hops of a path; a longer one is shortened.
        max_parameters: Most parameters of a merged model; the path of a larger one is shortened.
    """

    scales: ScaleSettings = "none"
    semantics: Semantics = "branch"
    max_hops: Annotated[int, Field(ge=2)] | None = None
    max_parameters: Annotated[int, Field(ge=1)] | None = None


class DataFlowSettings(PathSettings):
    """A search space file of type `data_flow`.

    Attributes:
        type: `data_flow`.
        genome: How a genome stands for a path.
        first_layer: Layer of the first source model that every path starts with; -1 is its last.
        last_layer: Layer of the first source model that every path ends with.
    """

    type: Literal["data_flow"]
    genome: GenomeSettings
    first_layer: int = 0
    last_layer: int = -1
