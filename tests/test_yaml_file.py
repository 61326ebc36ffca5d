"""YAML is read strictly, with lines, and every fault is reported at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import ConfigurationError
from evomerge.yaml_file import (
    MAX_BYTES,
    Document,
    StrictRecord,
    dump_yaml,
    parse_yaml,
    read_single,
    read_yaml,
    validate,
)
from tests.strategies import plain_values


class Part(StrictRecord):
    size: float
    name: str | None = None


class Whole(StrictRecord):
    title: str
    rate: float = 0.1
    flag: bool = False
    parts: list[Part] = []
    named: dict[str, Part] = {}


def one(text: str, *, lenient: bool = False) -> Document:
    (document,) = parse_yaml(text, file="x.yml", lenient=lenient)
    return document


def faults(text: str, *, lenient: bool = False) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        validate(Whole, one(text, lenient=lenient))
    return [str(fault) for fault in caught.value.faults]


def fault(text: str, *, lenient: bool = False) -> str:
    (only,) = faults(text, lenient=lenient)
    return only


# Reading.


def test_values_know_their_lines() -> None:
    document = one("title: a\nparts:\n  - size: 1\n  - size: 2\n    name: b\n")
    assert document.lines[("title",)] == 1
    assert document.lines[("parts", 1)] == 4
    assert document.lines[("parts", 1, "name")] == 5


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "a: 1\n\n'a': 3\n", "x: {a: 1,\n\n a: 2}\n"])
def test_duplicate_keys_are_refused_with_the_line_of_the_second(text: str, lenient: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"x\.yml:3: (x\.)?a: the key appears twice"):
        one(text, lenient=lenient)


def test_strict_files_know_no_aliases() -> None:
    with pytest.raises(ConfigurationError, match=r"x\.yml:1: b: aliases"):
        one("a: &x [1, 2]\nb: *x\n")
    with pytest.raises(ConfigurationError, match="merge keys"):
        one("a: &x {b: 1}\nc: {<<: {d: 2}}\n")


def test_lenient_files_have_aliases_expanded() -> None:
    assert one("a: &x [1, 2]\nb: *x\n", lenient=True).data == {"a": [1, 2], "b": [1, 2]}


def test_lenient_merge_keys_give_way_to_own_keys_and_earlier_mappings() -> None:
    text = "a: &a {k: 1, l: 1}\nb: &b\n  k: 2\n  m: 2\nc:\n  l: 3\n  <<: [*a, *b]\nd: {<<: *a, k: 4}\n"
    document = one(text, lenient=True)
    assert document.data["c"] == {"k": 1, "l": 3, "m": 2}
    assert document.data["d"] == {"k": 4, "l": 1}
    assert document.data == yaml.safe_load(text)
    assert document.lines[("c",)] == 5
    assert document.lines[("c", "l")] == 6


@pytest.mark.parametrize(
    "bomb",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
        "a: &a [1, *a]\n",
        "a: &a {b: 1, <<: *a}\n",
    ],
    ids=["lists", "merge keys", "recursive list", "recursive merge key"],
)
def test_alias_bombs_end_at_a_cap(bomb: str) -> None:
    with pytest.raises(ConfigurationError, match=r"once aliases are expanded|nested too deeply"):
        one(bomb, lenient=True)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        one("[" * 5000)


def test_yes_and_no_are_text_in_strict_files_and_booleans_in_lenient_ones() -> None:
    text = "[yes, No, on, OFF, true, False]"
    assert one(text).data == ["yes", "No", "on", "OFF", True, False]
    assert one(text, lenient=True).data == [True, False, True, False, True, False]


@pytest.mark.parametrize("lenient", [False, True])
def test_dates_stay_text(lenient: bool) -> None:
    assert one("a: 2024-01-01", lenient=lenient).data == {"a": "2024-01-01"}


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.getcwd []", "a: !!set {b}", "a: !thing x"])
def test_tags_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"x\.yml:1: a: .*"):
        one(text, lenient=True)


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1\nb: 2", 2), ("a: b: c", 1), ("a: *x", 1), ("\ta: 1", 1), ("a: '", 1)]
)
def test_what_is_not_yaml_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigurationError, match=f"x.yml:{line}: not valid YAML: "):
        one(text)


def test_unprintable_characters_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not valid YAML: special characters"):
        one("a: \x00")


def test_numbers_too_long_to_read_are_refused_with_their_place() -> None:
    with pytest.raises(ConfigurationError, match=r"x\.yml:1: a: cannot be read"):
        one("a: " + "9" * 5000)


def test_keys_must_be_scalars() -> None:
    with pytest.raises(ConfigurationError, match="keys must be plain text"):
        one("? [a]\n: 1\n")


# Files.


def test_several_documents_are_read_but_not_where_one_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "two.yml"
    file.write_text("a: 1\n---\nb: 2\n")
    assert [document.data for document in read_yaml(file)] == [{"a": 1}, {"b": 2}]
    assert [document.lines[(key,)] for document, key in zip(read_yaml(file), "ab", strict=True)] == [1, 3]
    with pytest.raises(ConfigurationError, match="expected one YAML document, found 2"):
        read_single(file)
    file.write_text("# nothing\n")
    with pytest.raises(ConfigurationError, match="found 0"):
        read_single(file)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "bom.yml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_single(file).data == {"a": 1, "b": 2}


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "experiment.yml").touch()
    with pytest.raises(ConfigurationError, match=r"did you mean 'experiment\.yml'"):
        read_single(tmp_path / "experimemt.yml")


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "x.yml", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read as text"):
            read_single(path)


def test_huge_files_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.yml").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigurationError, match="larger than"):
        read_single(tmp_path / "x.yml")


# Validation.


def test_all_faults_come_at_once_with_lines_and_paths() -> None:
    text = "titel: a\nrate: fast\nparts:\n  - size: 1\n  - size: big\n    nam: b\nflag: 1\n"
    assert faults(text) == [
        "x.yml:1: title: missing; this key is required (is it meant by 'titel'?)",
        "x.yml:2: rate: input should be a valid number, got 'fast'",
        "x.yml:7: flag: input should be a valid boolean, got 1",
        "x.yml:5: parts.1.size: input should be a valid number, got 'big'",
        "x.yml:6: parts.1.nam: unknown key (did you mean 'name'?); known keys: name, size",
        "x.yml:1: titel: unknown key (did you mean 'title'?); known keys: flag, named, parts, rate, title",
    ]


def test_numbers_that_yaml_reads_as_text_are_explained() -> None:
    assert fault("title: a\nrate: 1e-3") == (
        "x.yml:2: rate: input should be a valid number, got '1e-3'; "
        "YAML reads this as text, write it as a plain decimal such as 0.001"
    )


def test_no_is_not_false_in_strict_files() -> None:
    assert fault("title: a\nflag: no") == "x.yml:2: flag: input should be a valid boolean, got 'no'"
    assert validate(Whole, one("title: no")).title == "no"


def test_unknown_keys_inside_mappings_of_records_name_the_records_keys() -> None:
    assert fault("title: a\nnamed:\n  first: {size: 1, nmae: b}") == (
        "x.yml:3: named.first.nmae: unknown key (did you mean 'name'?); known keys: name, size"
    )


def test_wrong_kinds_of_values_are_named() -> None:
    assert fault("title: {a: 1}").endswith("got a mapping")
    assert fault("title: [a]").endswith("got a list")
    assert fault("title:").endswith("got nothing")
    assert len(fault(f"title: a\nrate: {'x' * 500}")) < 160


@pytest.mark.parametrize("text", ["[1]", "text", "~"])
def test_a_document_must_be_a_mapping(text: str) -> None:
    assert "expected a mapping of keys to values" in fault(text)


def test_a_part_of_a_document_can_be_validated_alone() -> None:
    document = one("parts:\n  - size: 1\n    sice: 2\n")
    with pytest.raises(
        ConfigurationError, match=r"x\.yml:3: parts\.0\.sice: unknown key \(did you mean 'size'"
    ):
        validate(Part, document, at=("parts", 0))


# Writing.


@settings(deadline=None)
@given(plain_values)
def test_what_is_written_reads_back_strictly_leniently_and_by_any_reader(value: Any) -> None:
    text = dump_yaml(value)
    assert _typed(one(text).data) == _typed(value)
    assert _typed(one(text, lenient=True).data) == _typed(value)
    assert _typed(yaml.safe_load(text)) == _typed(value)


@settings(deadline=None)
@given(st.floats())
def test_floats_are_written_exactly(value: float) -> None:
    back = one(dump_yaml([value])).data[0]
    assert isinstance(back, float)
    assert (math.isnan(back) and math.isnan(value)) or repr(back) == repr(value)


def test_keys_keep_their_order_and_shared_values_are_written_out() -> None:
    shared = [1, 2]
    assert dump_yaml({"b": shared, "a": {"x": shared}}) == "b: [1, 2]\na:\n  x: [1, 2]\n"


def _typed(value: Any) -> Any:
    """Tells 1 from 1.0 and True, and -0.0 from 0.0."""
    if isinstance(value, dict):
        return {_typed(key): _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (type(value), repr(value))
