"""The lines of a journal: records to JSON with a checksum, and back.

`crc` is the CRC-32 of the line's other fields as JSON in UTF-8, keys sorted, no spaces. A line that was
changed in any way is refused, even where the change means the same. Files are `evomerge.journal`'s.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import zlib
from collections.abc import Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any

from evomerge.errors import RefusedError
from evomerge.records import Block, Final, Header, Status, Trial

FORMAT = 1
"""Version of the file format; another one is refused, never guessed at."""

Record = Header | Trial | Block | Final
"""What a line holds."""


def record_name(record: Record) -> str:
    """What messages call a record; two records of one name cannot be in one journal."""
    if isinstance(record, Final):
        return f"the final evaluation {record.name!r} on {record.stage}"
    if isinstance(record, Block):
        return f"block {record.block} of trial {record.trial}"
    return "the header" if isinstance(record, Header) else f"trial {record.number}"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):  # numpy's integers and float32 are no int and no float
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"expected numbers, text and mappings of them, found {type(value).__name__}")


_dumps = partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)


def _line(fields: Mapping[str, Any]) -> bytes:
    """Serialise fields that came out of JSON, with their checksum at the end."""
    crc = zlib.crc32(_dumps(fields, sort_keys=True).encode())
    return _dumps({**fields, "crc": f"{crc:08x}"}).encode() + b"\n"


def encode_line(record: Record) -> bytes:
    """Write a record as a line, its end included; a ValueError says why it cannot be recorded."""
    fields = {entry.name: getattr(record, entry.name) for entry in dataclasses.fields(record)}
    match record:
        case Header():
            fields = {"kind": "header", "format": FORMAT, **fields}
        case Trial():
            fields = {"kind": "trial", "trial": fields.pop("number"), **fields}
        case Block():
            fields = {"kind": "block", **fields}
        case Final():
            fields = {"kind": "final", **fields}
    try:
        # A reason may quote undecodable bytes as lone surrogates, which UTF-8 cannot hold: they become `?`.
        return _line(json.loads(_dumps(fields).encode("utf-8", "replace")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{record_name(record)} cannot be recorded: {error}") from error


def decode_line(line: bytes) -> Record:
    """Read one line without its end; a ValueError says what is wrong with it."""
    if line.startswith(codecs.BOM_UTF8):
        raise ValueError(r"it starts with a byte order mark (remove it: `sed -i '1s/^\xef\xbb\xbf//'`)")
    if line.endswith(b"\r"):
        raise ValueError(r"line ends were changed to CRLF (change them back: `sed -i 's/\r$//'`)")
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON in UTF-8 ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    # Looked at before the checksum, which another format may make in another way.
    if (found := fields.get("format", FORMAT)) != FORMAT:
        raise RefusedError(
            f"the journal has format {found!r}, this evomerge reads format {FORMAT}; use a version of "
            "evomerge that reads it (the first line of the journal names the one that wrote it)"
        )
    crc = fields.pop("crc", None)
    # Comparing whole lines also finds changes that mean the same, such as `1e-05` turned into `1E-05`.
    if (expected := _line(fields)) != line + b"\n":
        raise ValueError(f"it does not match its checksum ({crc}, expected {expected[-11:-3].decode()})")
    try:
        match fields.pop("kind"):
            case "header":
                del fields["format"]
                return Header(**fields)
            case "trial":
                genome, status = tuple(map(float, fields.pop("genome"))), Status(fields.pop("status"))
                return Trial(number=fields.pop("trial"), genome=genome, status=status, **fields)
            case "block":
                return Block(status=Status(fields.pop("status")), **fields)
            case "final":
                return Final(status=Status(fields.pop("status")), **fields)
            case kind:
                raise ValueError(f"its kind is {kind!r}, expected header, trial, block or final")
    except (KeyError, TypeError) as error:
        raise ValueError(f"a field is missing, unknown or of another type ({error})") from error
