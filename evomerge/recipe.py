"""Recipes: mergekit's YAML as frozen records, and the value of a parameter for one tensor.

A recipe is the complete declarative description of one merged model. Any mergekit configuration of the
`models`, `slices` or `modules` form is read, and what is written here mergekit reads to the same merge.
What mergekit cannot express lies under the top-level key `evomerge`, which mergekit ignores.

This module knows the shape of a recipe only. Which methods and parameters exist, and whether a value
suits them, is checked in `merge/check.py`; which tensors there are, in `merge/plan.py`.

Format: https://github.com/arcee-ai/mergekit#merge-configuration
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, PrivateAttr, Tag, model_validator

from evomerge.errors import ConfigurationError, Fault
from evomerge.yaml_file import (
    Document,
    FieldPath,
    StrictRecord,
    dump_yaml,
    parse_yaml,
    read_single,
    read_yaml,
    validate,
)

Scalar = bool | int | float | str


def _as_value(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, (bool, int, float, str)):
            found = {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(item), repr(item))
            raise ValueError(f"expected a number, true, false, text or a list of these, got {found}")
    return value


class ConditionalValue(StrictRecord):
    """A value for the tensors whose name contains `filter`; no filter or `*` matches every tensor."""

    value: Annotated[Scalar | list[Scalar], BeforeValidator(_as_value)]
    filter: str | None = None

    def matches(self, tensor_name: str) -> bool:
        """Tell whether the value is meant for the tensor."""
        return self.filter in (None, "*") or (self.filter or "") in tensor_name


def _as_conditionals(value: Any) -> Any:
    """Read the three ways to write a setting as one: a list of conditional values.

    A scalar and a gradient (a list of scalars) become one value without a filter.
    """
    if isinstance(value, ConditionalValue):
        return [value]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and any(isinstance(item, (dict, ConditionalValue)) for item in value):
        return value
    return [{"value": value}]


def _in_short(setting: list[ConditionalValue]) -> Any:
    """Write a setting the short way: a lone value without a filter stands for itself."""
    if len(setting) == 1 and setting[0].filter is None:
        return setting[0].value
    return [conditional.model_dump(exclude_defaults=True) for conditional in setting]


Setting = Annotated[list[ConditionalValue], BeforeValidator(_as_conditionals), PlainSerializer(_in_short)]
"""What a recipe says about one parameter: conditional values, the first that matches counts."""

Parameters = dict[str, Setting]


def _as_model_text(value: Any) -> Any:
    """Accept mergekit's long form of a model, `{model: {path, revision}, lora: {path}}`."""
    if not isinstance(value, dict):
        return value
    if "model" not in value or set(value) - {"model", "lora"}:
        found = ", ".join(map(str, value))
        raise ValueError(f"expected a model's text, or a mapping of 'model' and 'lora', got keys {found}")
    text = _path_text(value["model"])
    return f"{text}+{_path_text(value['lora'])}" if value.get("lora") is not None else text


def _path_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if (
        not isinstance(part, dict)
        or not isinstance(part.get("path"), str)
        or set(part) - {"path", "revision"}
    ):
        raise ValueError(f"expected a path, or a mapping of 'path' and 'revision', got {part!r}")
    return str(part["path"]) + (f"@{part['revision']}" if part.get("revision") is not None else "")


ModelText = Annotated[str, BeforeValidator(_as_model_text)]
"""A model as recipes write it: `id-or-path[@revision][+adapter]`."""


def _as_int(value: Any) -> Any:
    # What is no scalar is left to the type's own message.
    return coerce(value, "int") if isinstance(value, (bool, int, float, str)) else value


_AsInt = BeforeValidator(_as_int)


def _as_pair(value: Any) -> Any:
    return tuple(coerce(item, "int") for item in value) if isinstance(value, list) else value


class InputModel(StrictRecord):
    """One model of the `models` form."""

    model: ModelText
    parameters: Parameters | None = None


class InputSlice(StrictRecord):
    """Layers `layer_range[0]` up to but excluding `layer_range[1]` of one model."""

    model: ModelText
    layer_range: Annotated[tuple[int, int], BeforeValidator(_as_pair), PlainSerializer(list)]
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _check_range(self) -> InputSlice:
        first, end = self.layer_range
        # Of a module without layers, all of it is [0, 0].
        if not 0 <= first < end and (first, end) != (0, 0):
            raise ValueError(
                f"layer_range: expected [first, end] with 0 <= first < end, got [{first}, {end}]"
            )
        return self


class OutputSlice(StrictRecord):
    """Consecutive layers of the merged model and what they are merged from."""

    sources: Annotated[list[InputSlice], Field(min_length=1)]
    base_model: ModelText | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> OutputSlice:
        lengths = {end - first for first, end in (source.layer_range for source in self.sources)}
        if len(lengths) > 1:
            found = ", ".join(f"{s.model} {list(s.layer_range)}" for s in self.sources)
            raise ValueError(f"sources: every layer_range of a slice must have the same length; got {found}")
        return self

    @property
    def num_layers(self) -> int:
        """Number of layers the slice adds to the merged model."""
        first, end = self.sources[0].layer_range
        return end - first


class Module(StrictRecord):
    """One module of the `modules` form; decoder-only language models have a single one."""

    models: Annotated[list[InputModel], Field(min_length=1)] | None = None
    slices: Annotated[list[OutputSlice], Field(min_length=1)] | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _check_form(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise ValueError("expected exactly one of 'models' and 'slices'")
        return self


class ZeroRow(StrictRecord):
    """A token's embedding that is zero."""

    kind: Literal["zero"]


class TokenRow(StrictRecord):
    """A token's embedding that is the one of a token of a model, named by its text or its id."""

    kind: Literal["model_token"]
    model: ModelText
    token: str | None = None
    token_id: Annotated[int, _AsInt, Field(ge=0)] | None = None


def _as_row(value: Any) -> Any:
    if not isinstance(value, dict) or "kind" not in value:
        return value
    if value["kind"] not in ("zero", "model_token"):
        raise ValueError(f"kind: expected zero or model_token, got {value['kind']!r}")
    named = [key for key in ("token", "token_id") if value.get(key) is not None]
    if value["kind"] == "model_token" and len(named) != 1 and value.keys() <= TokenRow.model_fields.keys():
        raise ValueError("expected exactly one of 'token' and 'token_id'")
    return value


def _row_kind(value: Any) -> str:
    if isinstance(value, (ZeroRow, TokenRow)):
        return type(value).__name__
    if isinstance(value, dict) and "kind" in value:
        return "ZeroRow" if value["kind"] == "zero" else "TokenRow"
    return "name"


RowSource = Annotated[
    Annotated[ZeroRow, Tag("ZeroRow")]
    | Annotated[TokenRow, Tag("TokenRow")]
    | Annotated[ModelText, Tag("name")],
    Discriminator(_row_kind),
    BeforeValidator(_as_row),
]
"""Where a token's embedding comes from: zero, a token of a model, or the same token of a model."""


class TokenSettings(StrictRecord):
    """A token that the merged vocabulary must have.

    Attributes:
        source: Its embedding in the models that lack it; by default as for any other token.
        force: Replace the embedding of the models that have it too.
    """

    source: RowSource | None = None
    force: Annotated[bool, BeforeValidator(lambda value: coerce(value, "bool"))] = False

    @model_validator(mode="after")
    def _check_source(self) -> TokenSettings:
        if self.force and self.source is None:
            raise ValueError("force: needs a 'source' to take the embedding from")
        return self


class TokenizerSettings(StrictRecord):
    """Which vocabulary the merged model gets.

    Attributes:
        source: `union`, `base` or one of the models.
        tokens: Settings of single tokens; those that the vocabulary lacks are added.
        pad_to_multiple_of: Rows of the embedding are filled up to a multiple of this.
    """

    source: ModelText = "union"
    tokens: dict[str, TokenSettings] | None = None
    pad_to_multiple_of: Annotated[int, _AsInt, Field(ge=1)] | None = None


def _as_float(value: Any) -> Any:
    return coerce(value, "float") if isinstance(value, (bool, int, float, str)) else value


_AsFloat = BeforeValidator(_as_float)


class TensorScale(StrictRecord):
    """Makes a merged tensor w into factor * (offset + w) - offset.

    Attributes:
        tensor: Its name in the merged model.
        factor: The factor; finite.
        offset: 1 for the weight of a norm that multiplies by (1 + w), so that the norm's result is scaled.
    """

    tensor: str
    factor: Annotated[float, _AsFloat]
    offset: Annotated[float, _AsFloat] = 0.0


class Extension(StrictRecord):
    """What mergekit cannot express.

    Attributes:
        seed: Seed of the counter hash behind DARE's masks.
        scales: Merged tensors that are scaled, whatever the method, before they are rounded.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    scales: list[TensorScale] = []

    @model_validator(mode="after")
    def _check_scales(self) -> Extension:
        counted = Counter(scale.tensor for scale in self.scales)
        if repeated := [name for name, count in counted.items() if count > 1]:
            raise ValueError(f"scales: expected every tensor once, got {repeated[0]!r} more than once")
        return self


class Recipe(StrictRecord):
    """The complete declarative description of one merged model."""

    models: Annotated[list[InputModel], Field(min_length=1)] | None = None
    slices: Annotated[list[OutputSlice], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, Module], Field(min_length=1)] | None = None
    merge_method: str
    base_model: ModelText | None = None
    parameters: Parameters | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelText | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = None
    evomerge: Extension = Extension()

    _document: Document | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_form(self) -> Recipe:
        given = [form for form in ("models", "slices", "modules") if getattr(self, form) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of 'models', 'slices' and 'modules', got {given}")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("'tokenizer_source' and 'tokenizer' exclude each other; keep one")
        return self

    def fault(self, path: FieldPath, reason: str) -> Fault:
        """Describe a fault of this recipe, with file and line when it was read from a file."""
        return (self._document or Document(data=None)).fault(path, reason)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every model the recipe names, in order of first appearance, the base model last if new."""
        names = [source.model for _, source in self.inputs()]
        names += [name for _, name in self._base_models() if name is not None]
        return tuple(dict.fromkeys(names))

    def model_places(self) -> Iterator[tuple[FieldPath, str]]:
        """Every place that names a model to merge, with what it says."""
        for place, source in self.inputs():
            yield (*place, "model"), source.model
        yield from ((place, name) for place, name in self._base_models() if name is not None)

    def inputs(self) -> Iterator[tuple[FieldPath, InputModel | InputSlice]]:
        """Every input entry with its place in the recipe."""
        for place, module in self.modules_or_self():
            for index, model in enumerate(module.models or []):
                yield (*place, "models", index), model
            for number, piece in enumerate(module.slices or []):
                for index, source in enumerate(piece.sources):
                    yield (*place, "slices", number, "sources", index), source

    def modules_or_self(self) -> Iterator[tuple[FieldPath, Module | Recipe]]:
        """The parts that hold `models` or `slices`, with their place."""
        if self.modules is None:
            yield (), self
        else:
            for name, module in self.modules.items():
                yield ("modules", name), module

    def parameter_sets(self) -> Iterator[tuple[FieldPath, Parameters]]:
        """Every `parameters` mapping with its place in the recipe."""
        if self.parameters:
            yield ("parameters",), self.parameters
        for place, module in self.modules_or_self():
            if isinstance(module, Module) and module.parameters:
                yield (*place, "parameters"), module.parameters
            for number, piece in enumerate(module.slices or []):
                if piece.parameters:
                    yield (*place, "slices", number, "parameters"), piece.parameters
        for place, source in self.inputs():
            if source.parameters:
                yield (*place, "parameters"), source.parameters

    def _base_models(self) -> Iterator[tuple[FieldPath, str | None]]:
        yield ("base_model",), self.base_model
        for place, module in self.modules_or_self():
            for number, piece in enumerate(module.slices or []):
                yield (*place, "slices", number, "base_model"), piece.base_model

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values in mergekit's shape, defaults left out, settings in short form."""
        extension = {"seed": self.evomerge.seed, **self.evomerge.model_dump(exclude_defaults=True)}
        return {**self.model_dump(exclude_defaults=True), "evomerge": extension}

    def to_yaml(self) -> str:
        """The recipe as YAML that mergekit and `Recipe` read to the same merge."""
        return dump_yaml(self.to_dict())

    @property
    def hash(self) -> str:
        """Hash of the canonical recipe, 16 hexadecimal digits; equal recipes have equal hashes."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values.

        Raises:
            ConfigurationError: Carries every fault found.
        """
        return cls.from_document(Document(data=dict(data)))

    @classmethod
    def from_document(cls, document: Document) -> Recipe:
        """Build a recipe from a YAML document; faults name its file and lines."""
        recipe = validate(cls, document)
        recipe._document = document
        return recipe

    @classmethod
    def from_yaml(cls, text: str, *, file: str | None = None) -> Recipe:
        """Read a recipe from the text of one YAML document.

        Raises:
            ConfigurationError: Carries every fault found.
        """
        documents = parse_yaml(text, file=file, lenient=True)
        if len(documents) != 1:
            raise ConfigurationError(
                Fault(path="", file=file, reason=f"expected one recipe, found {len(documents)} documents")
            )
        return cls.from_document(documents[0])

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe from a file; see `from_yaml`."""
        return cls.from_document(read_single(path, lenient=True))

    @classmethod
    def read_all(cls, path: Path) -> list[Recipe]:
        """Read every recipe of a file of one or more YAML documents.

        Raises:
            ConfigurationError: Carries every fault found in any of them.
        """
        recipes: list[Recipe] = []
        faults: list[Fault] = []
        for document in read_yaml(path, lenient=True):
            try:
                recipes.append(cls.from_document(document))
            except ConfigurationError as error:
                faults += error.faults
        if faults or not recipes:
            raise ConfigurationError(
                faults or Fault(path="", file=str(path), reason="expected a recipe, found nothing")
            )
        return recipes


Kind = Literal["bool", "int", "float"]


def coerce(value: Scalar, kind: Kind) -> bool | int | float:
    """Read a scalar of a recipe as the type a parameter has; text that looks like a number is one.

    Raises:
        ValueError: The value does not suit the type.
    """
    if kind == "bool":
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (kind == "float" or number.is_integer()):
            return number if kind == "float" else int(number)
    expected = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
    raise ValueError(f"expected {expected}, got {value!r}")


_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True} | {
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def evaluate(setting: Setting, *, tensor_name: str, depth: float, kind: Kind) -> bool | int | float | None:
    """Value of a setting for one tensor.

    Args:
        setting: Conditional values; the first whose filter matches counts.
        tensor_name: Name of the tensor that the filters are compared with.
        depth: Position of the tensor's layer in its slice, 0 for the first to 1 for the last; a gradient is
            interpolated there linearly.
        kind: Type of the parameter.

    Returns:
        The value, or None when no filter matches.

    Raises:
        ValueError: A value does not suit the type.
    """
    for conditional in setting:
        if not conditional.matches(tensor_name):
            continue
        if not isinstance(conditional.value, list):
            return coerce(conditional.value, kind)
        points = [coerce(point, kind) for point in conditional.value]
        if not points:
            return None
        scaled = depth * (len(points) - 1)
        index = int(scaled)
        if kind == "bool":
            return points[index]
        fraction = scaled - index
        following = points[min(index + 1, len(points) - 1)]
        return coerce((1 - fraction) * points[index] + fraction * following, kind)
    return None
