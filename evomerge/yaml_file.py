"""Strict YAML whose values remember their lines, and validation that reports every fault at once.

PyYAML reads the syntax; this module refuses what makes YAML treacherous (duplicate keys, bombs made of
aliases, `no` read as false) and turns pydantic's findings into faults with file, line and field path.
What the fields mean is left to the schemas in `recipe.py`, `experiment.py` and `spaces/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from evomerge.errors import ConfigurationError, Fault, nearest

MAX_BYTES = 4 * 1024 * 1024
MAX_NODES = 200_000
"""Cap on the values of one file after aliases are expanded."""

FieldPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class StrictRecord(BaseModel):
    """Base of every schema: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One YAML document with the line of every value.

    Attributes:
        data: The document as plain Python values.
        file: Name for messages, or None for text without a file.
        lines: Field path -> line, counted from 1.
        prefix: Where the document lies inside its file, when it is only a part of it.
    """

    data: Any
    file: str | None = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    prefix: FieldPath = ()

    def fault(self, path: FieldPath, reason: str) -> Fault:
        """Describe a fault at `path`, located at the nearest line known."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        where = dotted(self.prefix + path)
        return Fault(path=where, reason=reason, file=self.file, line=self.lines.get(known))


def dotted(path: FieldPath) -> str:
    """Write a field path the way messages and `--set` do: `models.0.parameters.weight`."""
    return ".".join(str(part) for part in path)


_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_BOOL = "tag:yaml.org,2002:bool"
_MERGE = "tag:yaml.org,2002:merge"


def _resolvers_without(*tags: str) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    return {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in tags]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _LenientLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates: 2024-01-01 is text."""

    yaml_implicit_resolvers = _resolvers_without(_TIMESTAMP)


class _StrictLoader(yaml.SafeLoader):
    """Also without YAML 1.1's yes, no, on and off."""

    yaml_implicit_resolvers = _resolvers_without(_TIMESTAMP, _BOOL)


_StrictLoader.add_implicit_resolver(
    _BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Builder:
    """Turns a node graph into plain values, noting lines and refusing what is unsafe."""

    def __init__(self, loader: yaml.SafeLoader, file: str | None, *, lenient: bool) -> None:
        self.loader = loader
        self.file = file
        self.lenient = lenient
        self.lines: dict[FieldPath, int] = {}
        self.num_nodes = 0
        self.seen: set[int] = set()

    def build(self, node: yaml.Node, path: FieldPath) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.error(node, path, f"more than {MAX_NODES} values once aliases are expanded")
        if id(node) in self.seen and not self.lenient:
            raise self.error(node, path, "aliases (*name) are not allowed here; write the value out")
        self.seen.add(id(node))
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag not in (
            yaml.resolver.Resolver.DEFAULT_MAPPING_TAG,
            yaml.resolver.Resolver.DEFAULT_SEQUENCE_TAG,
        ):
            raise self.error(node, path, f"the tag {node.tag} is not allowed; write plain values")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def scalar(self, node: yaml.ScalarNode, path: FieldPath) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = getattr(error, "problem", None) or error
            raise self.error(node, path, f"cannot be read: {reason}") from None

    def mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[Hashable, Any]:
        line = self.lines[path]
        merged: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged = {**self.merge_key(value_node, path), **merged}
        self.lines[path] = line
        own: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, path, "keys must be plain text")
            if key_node.tag == _MERGE:
                continue
            key = self.scalar(key_node, path)
            here = (*path, key if type(key) is int else str(key))
            if key in own:
                raise self.error(key_node, here, "the key appears twice; remove one of them")
            own[key] = self.build(value_node, here)
            self.lines[here] = key_node.start_mark.line + 1
        return {**merged, **own}

    def merge_key(self, node: yaml.Node, path: FieldPath) -> dict[Hashable, Any]:
        """The mapping that `<<` adds; of several the first wins, and the mapping's own keys over all."""
        if not self.lenient:
            raise self.error(node, path, "merge keys (<<) are not allowed here; write the values out")
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(part, yaml.MappingNode) for part in parts):
            raise self.error(node, path, "a merge key (<<) takes a mapping or a list of mappings")
        result: dict[Hashable, Any] = {}
        for part in parts:
            result = {**self.build(part, path), **result}
        return result

    def error(self, node: yaml.Node, path: FieldPath, reason: str) -> ConfigurationError:
        line = node.start_mark.line + 1
        return ConfigurationError(Fault(path=dotted(path), reason=reason, file=self.file, line=line))


def parse_yaml(text: str, *, file: str | None = None, lenient: bool = False) -> list[Document]:
    """Read every document of a YAML text.

    Args:
        text: The YAML.
        file: Name for messages.
        lenient: Accept what published mergekit recipes contain: aliases, merge keys, `yes` and `no`.

    Raises:
        ConfigurationError: The text is not YAML, too large, or uses something that is refused.
    """
    if len(text) > MAX_BYTES:
        raise ConfigurationError(Fault(path="", file=file, reason=f"larger than {MAX_BYTES} bytes"))
    documents = []
    try:
        loader = (_LenientLoader if lenient else _StrictLoader)(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            builder = _Builder(loader, file, lenient=lenient)
            documents.append(Document(data=builder.build(node, ()), file=file, lines=builder.lines))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        line = mark.line + 1 if mark is not None else None
        raise ConfigurationError(
            Fault(path="", file=file, line=line, reason=f"not valid YAML: {reason}")
        ) from None
    except RecursionError:
        raise ConfigurationError(Fault(path="", file=file, reason="nested too deeply")) from None
    return documents


def read_yaml(path: Path, *, lenient: bool = False) -> list[Document]:
    """Read every document of a YAML file.

    Raises:
        ConfigurationError: The file is missing, not text, or refused by `parse_yaml`.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(Fault(path="", file=str(path), reason=f"larger than {MAX_BYTES} bytes"))
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        reason = f"no such file{nearest(path.name, siblings)}"
        raise ConfigurationError(Fault(path="", file=str(path), reason=reason)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read as text: {error}"
        raise ConfigurationError(Fault(path="", file=str(path), reason=reason)) from None
    return parse_yaml(text, file=str(path), lenient=lenient)


def read_single(path: Path, *, lenient: bool = False) -> Document:
    """Read a file that must hold exactly one YAML document."""
    documents = read_yaml(path, lenient=lenient)
    if len(documents) != 1:
        reason = f"expected one YAML document, found {len(documents)}"
        raise ConfigurationError(Fault(path="", file=str(path), reason=reason))
    return documents[0]


def validate(schema: type[Model], document: Document, *, at: FieldPath = ()) -> Model:
    """Check a document, or the part of it under `at`, against a schema.

    Raises:
        ConfigurationError: Carries one fault per problem, each with line and field path.
    """
    data = document.data
    for part in at:
        data = data[part]
    if not isinstance(data, dict):
        raise ConfigurationError(
            document.fault(at, f"expected a mapping of keys to values, got {_describe(data)}")
        )
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigurationError(_faults(error, schema, document, at)) from None


def _faults(
    error: ValidationError, schema: type[BaseModel], document: Document, at: FieldPath
) -> list[Fault]:
    faults: list[Fault] = []
    for item in error.errors(include_url=False):
        kind = item["type"]
        path = at + _document_path(item["loc"], document.data, at, is_missing=kind == "missing")
        if kind == "extra_forbidden":
            known = _keys_beside(schema, item["loc"])
            reason = f"unknown key{nearest(str(item['loc'][-1]), known)}"
            reason += f"; known keys: {', '.join(sorted(known))}" if known else ""
        elif kind == "missing":
            reason = f"missing; this key is required{_misspelt(schema, item)}"
        elif kind == "value_error":
            reason = str(item["ctx"]["error"])
        else:
            reason = f"{_lower_first(item['msg'])}, got {_describe(item['input'])}"
            if isinstance(item["input"], str) and _is_number(item["input"]):
                reason += "; YAML reads this as text, write it as a plain decimal such as 0.001"
        fault = document.fault(path, reason)
        if fault not in faults:
            faults.append(fault)
    return faults


def _misspelt(schema: type[BaseModel], item: ErrorDetails) -> str:
    """Name the unknown key beside a missing one that was probably meant to be it."""
    known = _keys_beside(schema, item["loc"])
    unknown = (
        [str(key) for key in item["input"] if key not in known] if isinstance(item["input"], dict) else []
    )
    return nearest(str(item["loc"][-1]), unknown).replace("did you mean", "is it meant by")


def _document_path(loc: tuple[int | str, ...], data: Any, at: FieldPath, *, is_missing: bool) -> FieldPath:
    """Drop the names of union branches, which pydantic puts into its locations."""
    for part in at:
        data = data[part]
    path: list[str | int] = []
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (is_last and is_missing):
            continue
        path.append(part)
    return tuple(path)


def _keys_beside(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the schema knows where an unknown one was found."""
    candidates: list[Any] = [schema]
    for part in loc[:-1]:
        deeper: list[Any] = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                fields = candidate.model_fields
                if candidate.__name__ == part:
                    deeper.append(candidate)
                for name, info in fields.items():
                    if part in (name, info.alias):
                        deeper.extend(_models_in(info.annotation))
            else:
                deeper.append(candidate)
        candidates = deeper or candidates
    named = [model for model in candidates if model.__name__ == (loc[-2] if len(loc) > 1 else None)]
    return [
        info.alias or name
        for model in (named or candidates)
        if isinstance(model, type) and issubclass(model, BaseModel)
        for name, info in model.model_fields.items()
    ]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Dumper(yaml.SafeDumper):
    """Writes lists of scalars on one line and never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    plain = all(not isinstance(item, (dict, list)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


def _represent_float(dumper: yaml.SafeDumper, data: float) -> yaml.Node:
    """Write floats so that any YAML reader gets the same number back.

    PyYAML reads an exponent only behind a decimal point and with a sign: `1e-05` would come back as text.
    """
    text = repr(data) if math.isfinite(data) else {math.inf: ".inf", -math.inf: "-.inf"}.get(data, ".nan")
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    # PyYAML would fold the line breaks of Unicode into spaces unless they are escaped.
    style = '"' if set(data) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(float, _represent_float)


def dump_yaml(data: Any) -> str:
    """Write plain values as YAML that reads back to the same values, keys in the given order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
