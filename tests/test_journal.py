"""The journal loses nothing that it reported durable, heals a cut-off end and refuses any other damage."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evomerge
from evomerge.errors import (
    ConfigurationError,
    EvomergeError,
    JournalDamagedError,
    RefusedError,
    RunExistsError,
)
from evomerge.journal import Journal
from evomerge.records import Final, Header, Status, Trial

HEADER = Header(
    experiment="e1f0",
    settings={"name": "tiny", "search": {"evaluations": 8}},
    inputs={"models/base": "aa", "tasks/算数": "bb"},
    versions={"cma": "4.4.0", "torch": "2.9.0"},
    seed=7,
)


def trial(number: int) -> Trial:
    generator = random.Random(number)
    return Trial(
        number=number,
        candidate=f"candidate-{number}",
        genome=tuple(generator.uniform(-1, 1) * 10.0 ** generator.randint(-9, 2) for _ in range(5)),
        asked_after=max(0, number - 1),
        status=Status.OK,
        fitness=generator.random(),
        metrics={"算数": {"exact_match": generator.random()}},
        scores=f"scores/{number}-search.npz",
        seconds={"total": generator.random()},
        counts={"truncated": 3},
    )


FINAL = Final(
    name="winner",
    stage="holdout",
    candidate="c0ffee",
    recipe={"merge_method": "ties", "models": [{"model": "base", "parameters": {"weight": 0.1}}], "a": None},
    status=Status.OK,
    metrics={"sums": {"exact_match": 0.5}},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def written(path: Path, count: int = 4) -> list[Trial]:
    trials = [trial(number) for number in range(count)]
    with Journal.create(path, HEADER) as journal:
        for each in trials:
            journal.append(each)
    return trials


# Round trips


def test_a_reopened_journal_holds_what_was_appended_in_line_order(path: Path) -> None:
    records = [trial(2), trial(0), FINAL, replace(FINAL, stage="search"), trial(1)]
    with Journal.create(path, HEADER) as journal:
        for record in records:
            journal.append(record)
    for reopened in (Journal.load(path), Journal.open(path)):
        with reopened:
            assert reopened.header == journal.header == HEADER
            assert reopened.trials == journal.trials == [trial(2), trial(0), trial(1)]
            assert reopened.trials_by_number == {number: trial(number) for number in range(3)}
            assert reopened.finals == journal.finals == [FINAL, replace(FINAL, stage="search")]
            assert reopened.notes == []


texts = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
tables = st.dictionaries(texts, numbers, max_size=3)
recipes = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    header=st.builds(
        Header,
        experiment=texts,
        settings=st.dictionaries(texts, recipes, max_size=3),
        inputs=st.dictionaries(texts, texts, max_size=3),
        versions=st.dictionaries(texts, texts, max_size=3),
        seed=st.integers(),
    ),
    trials=st.lists(
        st.builds(
            Trial,
            number=st.integers(min_value=0),
            candidate=texts,
            genome=st.lists(numbers, max_size=5).map(tuple),
            asked_after=st.integers(min_value=0),
            status=st.sampled_from(Status),
            reason=texts,
            fitness=st.none() | numbers,
            metrics=st.dictionaries(texts, tables, max_size=3),
            scores=texts,
            seconds=tables,
            attempts=st.integers(min_value=1),
            counts=st.dictionaries(texts, st.integers(), max_size=3),
        ),
        max_size=3,
        unique_by=lambda each: each.number,
    ),
    final=st.builds(
        Final,
        name=texts,
        stage=st.sampled_from(["holdout", "search"]),
        candidate=texts,
        recipe=st.none() | st.dictionaries(texts, recipes, max_size=3),
        status=st.sampled_from(Status),
        reason=texts,
        metrics=st.dictionaries(texts, tables, max_size=3),
        scores=texts,
        seconds=tables,
        counts=st.dictionaries(texts, st.integers(), max_size=3),
    ),
)
def test_every_finite_float_and_every_name_round_trips_exactly(
    header: Header, trials: list[Trial], final: Final
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        with Journal.create(path, header) as journal:
            for record in (*trials, final):
                journal.append(record)
        reopened = Journal.load(path)
    # repr tells -0.0 from 0.0 and shows the order of keys
    assert repr(reopened.header) == repr(header)
    assert repr(reopened.trials) == repr(journal.trials) == repr(trials)
    assert repr(reopened.finals) == repr([final])


def test_a_line_carries_the_documented_fields_and_checksum(path: Path) -> None:
    written(path, 1)
    header, line = (json.loads(text) for text in path.read_bytes().splitlines())
    fields = ["kind", "format", "experiment", "settings", "inputs", "versions", "seed", "crc"]
    assert list(header) == fields
    assert (header["kind"], header["format"], header["seed"]) == ("header", 1, 7)
    assert list(line)[:5] == ["kind", "trial", "candidate", "genome", "asked_after"]
    crc = line.pop("crc")
    canonical = json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    assert crc == f"{zlib.crc32(canonical.encode()):08x}"


def test_numpy_numbers_and_other_mappings_are_recorded_as_plain_ones(path: Path) -> None:
    odd = replace(
        trial(0),
        genome=(np.float64(0.1), np.float32(0.5)),
        metrics=MappingProxyType({"sums": MappingProxyType({"exact_match": np.float32(0.25)})}),
        counts={"truncated": np.int64(2)},
    )
    with Journal.create(path, HEADER) as journal:
        journal.append(odd)
    (kept,) = journal.trials
    assert repr(kept) == repr(Journal.load(path).trials[0])
    assert repr(kept.genome) == "(0.1, 0.5)"
    assert kept.metrics == {"sums": {"exact_match": 0.25}}
    assert repr(kept.counts) == "{'truncated': 2}"


def test_a_reason_with_undecodable_bytes_is_recorded(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(replace(trial(0), status=Status.FAILED, reason="no file \udcff\ud83d\ude00\n\0"))
    assert Journal.load(path).trials == journal.trials
    assert journal.trials[0].reason == "no file ???\n\0"


# Refusals before anything is written


def test_an_existing_run_is_not_overwritten(path: Path) -> None:
    trials = written(path)
    with pytest.raises(RunExistsError, match="evomerge resume"):
        Journal.create(path, HEADER)
    assert Journal.load(path).trials == trials


def test_an_empty_file_left_by_a_crash_does_not_block_a_new_run(path: Path) -> None:
    path.touch()
    Journal.create(path, HEADER).close()
    assert Journal.load(path).header == HEADER


@pytest.mark.parametrize("record", [trial(2), FINAL], ids=["trial", "final"])
def test_a_record_is_taken_once(path: Path, record: Trial | Final) -> None:
    written(path)
    with Journal.open(path) as journal:
        if record is FINAL:
            journal.append(record)
        before = path.read_bytes()
        with pytest.raises(ValueError, match="is recorded already"):
            journal.append(record)
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), object()])
def test_what_is_no_finite_number_is_refused_and_the_journal_stays_usable(path: Path, number: float) -> None:
    with Journal.create(path, HEADER) as journal:
        with pytest.raises(ValueError, match="trial 0 cannot be recorded"):
            journal.append(replace(trial(0), fitness=number))
        journal.append(trial(0))
    assert Journal.load(path).trials == journal.trials == [trial(0)]


def test_a_loaded_journal_takes_no_records(path: Path) -> None:
    written(path)
    with pytest.raises(ValueError, match="read-only or closed"):
        Journal.load(path).append(FINAL)


def test_a_folder_without_a_journal_is_named(path: Path) -> None:
    for read in (Journal.open, Journal.load):
        with pytest.raises(ConfigurationError, match=r"journal\.jsonl.*holds no run"):
            read(path)


# A cut-off end


def test_a_last_record_cut_at_any_byte_is_moved_aside_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    trials = written(whole, 2)
    trials.append(Trial(number=2, candidate="算数", genome=(0.1,), asked_after=2, status=Status.INVALID))
    with Journal.open(whole) as journal:
        journal.append(trials[-1])
    data = whole.read_bytes()
    start = data.rindex(b"\n", 0, len(data) - 1) + 1
    for cut in range(start, len(data)):
        path = tmp_path / str(cut) / "journal.jsonl"
        path.parent.mkdir()
        path.write_bytes(data[:cut])

        loaded = Journal.load(path)
        assert loaded.trials == trials[:-1]
        assert len(loaded.notes) == (cut > start)
        assert path.read_bytes() == data[:cut]

        with Journal.open(path) as journal:
            assert journal.trials == trials[:-1]
            backup = path.with_name("journal.jsonl.torn-1")
            if cut > start:
                assert backup.read_bytes() == data[start:cut]
                assert "journal.jsonl.torn-1" in journal.notes[0]
            else:
                assert not backup.exists()
            journal.append(trials[-1])
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    "damage",
    [
        lambda last: last + b"\0" * 4096,
        lambda last: last[:50] + b"\0" * 4046,
        lambda last: b"\0" * 50 + last[50:],
        lambda last: b"\0" * len(last),
    ],
    ids=["after the record", "instead of its end", "instead of its start", "instead of the record"],
)
def test_nul_bytes_left_by_a_crash_are_moved_aside(path: Path, damage: Callable[[bytes], bytes]) -> None:
    trials = written(path)
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + damage(last))
    kept = trials if damage(last).startswith(last) else trials[:-1]
    assert Journal.load(path).trials == kept
    with Journal.open(path) as journal:
        assert journal.trials == kept
        assert len(journal.notes) == 1
        journal.append(FINAL)
    assert Journal.load(path).finals == [FINAL]


def test_a_second_crash_keeps_the_backup_of_the_first(path: Path) -> None:
    written(path)
    for number, torn in enumerate([b'{"kind":"tri', b'{"ki'], 1):
        with path.open("ab") as file:
            file.write(torn)
        Journal.open(path).close()
        assert path.with_name(f"journal.jsonl.torn-{number}").read_bytes() == torn


def test_a_run_that_crashed_within_its_header_never_started(path: Path) -> None:
    written(path, 0)
    data = path.read_bytes()
    for cut in (*range(len(data)), -1):
        torn = data[:cut] if cut >= 0 else b"\0" * 512
        path.write_bytes(torn)
        for read in (Journal.open, Journal.load):
            with pytest.raises(RefusedError, match=r"never started.*remove the folder"):
                read(path)
        assert path.read_bytes() == torn


# Damage


def refused(path: Path, match: str) -> None:
    before = path.read_bytes()
    for read in (Journal.open, Journal.load):
        with pytest.raises(JournalDamagedError, match=match):
            read(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_flipped_bit_in_a_complete_line_is_refused_by_its_number(path: Path, number: int) -> None:
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    generator = random.Random(number)
    for position in range(len(lines[number - 1]) - 1):
        bit = generator.randrange(8)
        line = bytearray(lines[number - 1])
        line[position] ^= 1 << bit
        if not line[position] or line[position] == ord("\n"):
            continue  # NUL bytes and line ends have their own tests
        damaged = b"".join([*lines[: number - 1], line, *lines[number:]])
        path.write_bytes(damaged)
        # A flip within the header's version of the format looks like another format.
        error = RefusedError if number == 1 else JournalDamagedError
        with pytest.raises(error) as caught:
            Journal.open(path)
        if isinstance(caught.value, JournalDamagedError):
            assert f"journal.jsonl: line {number} of 5 is damaged" in str(caught.value)
        assert path.read_bytes() == damaged
    assert list(path.parent.iterdir()) == [path]


def test_a_change_that_means_the_same_is_damage_too(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.append(replace(trial(0), fitness=1e-5))
    path.write_bytes(path.read_bytes().replace(b"1e-05", b"1E-05"))
    refused(path, "line 2 of 2 is damaged: it does not match its checksum")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: [*lines[:2], lines[2][:-1] + b"\x0b", *lines[3:]], "line 3 of 4 is damaged"),
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], "line 3 of 6 is damaged"),
        (lambda lines: [*lines[:2], b"\0" * 9 + b"\n", *lines[2:]], "line 3 of 6 is damaged"),
        (lambda lines: [*lines[:2], b"[" * 100_000 + b"\n", *lines[2:]], "line 3 of 6 is damaged"),
        (lambda lines: [*lines[:2], b"[]\n", *lines[2:]], "line 3 .*not a JSON object"),
        (lambda lines: [*lines[:2], b'{"a":NaN}\n', *lines[2:]], "line 3 of 6 is damaged"),
        (lambda lines: [*lines, lines[2]], "line 6 .*trial 1 is recorded already"),
        (lambda lines: [*lines, lines[0]], "line 6 .*the header is recorded already"),
        (lambda lines: lines[1:], "line 1 .*the header was expected, found trial 0"),
        (lambda lines: [b"\xef\xbb\xbf", *lines], "line 1 .*byte order mark .*sed"),
        (lambda lines: [line.replace(b"\n", b"\r\n") for line in lines], "line 1 .*CRLF .*sed"),
    ],
)
def test_other_damage_is_refused_by_line(
    path: Path, change: Callable[[list[bytes]], list[bytes]], match: str
) -> None:
    written(path)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    refused(path, match)


@pytest.mark.parametrize(
    "fields", [{"kind": "decision"}, {"kind": "final", "status": "ok", "colour": 1}, {"status": "ok"}]
)
def test_a_line_with_a_right_checksum_and_wrong_fields_is_refused(
    path: Path, fields: dict[str, object]
) -> None:
    written(path)
    text = json.dumps(fields, separators=(",", ":"), sort_keys=True)
    with path.open("a") as file:
        file.write(f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n')
    refused(path, "line 6 of 6 is damaged: (its kind|a field)")


def test_another_format_is_refused_naming_both_versions(path: Path) -> None:
    written(path)
    before = path.read_bytes().replace(b'"format":1', b'"format":2') + b'{"torn'
    path.write_bytes(before)
    for read in (Journal.open, Journal.load):
        with pytest.raises(RefusedError, match="format 2, this evomerge reads format 1"):
            read(path)
    assert path.read_bytes() == before


# Kills and full disks

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}

APPEND_FOREVER = """
import sys
from evomerge.journal import Journal
from evomerge.records import Final, Header, Status, Trial

with Journal.open(sys.argv[1]) as journal:
    number = len(journal.trials)
    while True:
        journal.append(Trial(number=number, candidate="c" * 3000, genome=(number / 7,), asked_after=number,
                             status=Status.OK, fitness=number / 3))
        print(number, flush=True)
        number += 1
"""


def test_a_kill_at_any_moment_loses_no_record_that_was_reported_durable(path: Path) -> None:
    Journal.create(path, HEADER).close()
    generator = random.Random(0)
    total = 0
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", APPEND_FOREVER, path], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        with child:
            assert child.stdout is not None
            first = child.stdout.readline()
            time.sleep(generator.uniform(0, 0.06))
            child.kill()
            reported = [int(line) for line in [first, *child.stdout] if line.endswith("\n")]
        with Journal.open(path) as journal:
            numbers = [each.number for each in journal.trials]
        assert reported == list(range(total, total + len(reported)))
        assert numbers == list(range(len(numbers)))
        assert len(numbers) - (reported[-1] + 1) in (0, 1)
        assert all(each.fitness == each.number / 3 for each in journal.trials)
        total = len(numbers)


FILL_THE_DISK = """
import json, resource, signal, sys
from evomerge.errors import EvomergeError
from evomerge.journal import Journal
from evomerge.records import Final, Header, Status, Trial

if sys.argv[2]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
journal = Journal.open(sys.argv[1])
number = len(journal.trials)
try:
    while True:
        journal.append(Trial(number=number, candidate="c" * 3000, genome=(), asked_after=number,
                             status=Status.OK, fitness=0.5))
        number += 1
except EvomergeError as error:
    print(json.dumps([number, len(journal.trials), str(error)]))
try:
    journal.append(Trial(number=number, candidate="", genome=(), asked_after=0, status=Status.OK))
except ValueError as error:
    print(error)
"""


def check_full(path: Path, limit: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, path, limit],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    report, closed = done.stdout.splitlines()
    recorded, in_memory, message = json.loads(report)
    assert recorded == in_memory > 0
    assert "the disk is full" in message
    assert "nothing that was recorded is lost" in message
    assert "evomerge resume" in message
    assert "closed" in closed
    assert path.read_bytes().endswith(b"}\n")
    loaded = Journal.load(path)
    assert [each.number for each in loaded.trials] == list(range(recorded))
    assert loaded.notes == []
    return int(recorded)


def test_a_file_that_may_not_grow_keeps_its_records_and_goes_on_later(path: Path) -> None:
    Journal.create(path, HEADER).close()
    recorded = check_full(path, "20000")
    with Journal.open(path) as journal:
        assert journal.notes == []
        journal.append(trial(recorded))
    assert Journal.load(path).trials[-1] == trial(recorded)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"needs `mount`: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_records_and_the_run_goes_on_when_there_is_space(small_disk: Path) -> None:
    path = small_disk / "journal.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(16_000))
    Journal.create(path, HEADER).close()
    recorded = check_full(path, "")
    with path.open("ab", buffering=0) as file:
        file.write(b'{"torn')
    ballast.write_bytes(bytes(1))
    with Journal.open(path) as journal:
        journal.append(trial(recorded))
    assert Journal.load(path).trials[-1] == trial(recorded)


def test_a_disk_that_takes_only_a_part_of_a_line_keeps_none_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = written(path)
    before = path.read_bytes()
    write, calls = os.write, []

    def write_some(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:40])

    journal = Journal.open(path)
    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(EvomergeError, match="the disk is full"):
        journal.append(FINAL)
    assert len(calls) == 2
    assert journal.trials == trials
    assert journal.finals == []
    assert path.read_bytes() == before


def test_a_record_counts_only_after_the_disk_has_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = written(path)
    before = path.read_bytes()
    events: list[str] = []
    write = os.write

    def fail(fd: int) -> None:
        events.append("fsync")
        raise OSError(errno.EIO, "Input/output error")

    def note(fd: int, data: memoryview) -> int:
        events.append("write")
        return write(fd, data)

    journal = Journal.open(path)
    monkeypatch.setattr(os, "write", note)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EvomergeError, match="Input/output error"):
        journal.append(FINAL)
    assert events[:2] == ["write", "fsync"]
    assert journal.trials == trials
    assert journal.finals == []
    assert path.read_bytes() == before


def test_an_interrupt_between_file_and_memory_closes_the_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path)
    journal = Journal.open(path)

    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            journal.append(FINAL)
    with pytest.raises(ValueError, match="closed"):
        journal.append(FINAL)
    with Journal.open(path) as reopened:
        assert reopened.finals == [FINAL]
