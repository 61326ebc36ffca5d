"""The journal of a run: an append-only JSONL file, the only truth about what was evaluated.

Line 1 is the header; every further line is a trial of the search, a block of documents of a trial where
candidates race, or a final evaluation:

    {"kind":"header","format":1,"experiment":...,"inputs":{...},"versions":{...},"seed":0,"crc":"89abcdef"}
    {"kind":"trial","trial":7,"candidate":...,"genome":[...],"asked_after":6,"status":"ok",...,"crc":...}
    {"kind":"block","trial":8,"block":0,"candidate":...,"status":"ok",...,"crc":...}
    {"kind":"final","name":"winner","stage":"holdout","candidate":...,"recipe":{...},...,"crc":...}

A record is on the disk (fsync) before `append` returns, so what a searcher was told survives a kill at any
moment. A last line cut off by a crash is moved aside when the journal is opened; damage anywhere else is
refused. The lines themselves are `evomerge.journal_lines`' work, replaying the trials into a searcher is the
loop's, keeping a second controller away is `evomerge.lock`'s.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from evomerge.errors import (
    ConfigurationError,
    EvomergeError,
    Fault,
    JournalDamagedError,
    RefusedError,
    RunExistsError,
)
from evomerge.journal_lines import Record, decode_line, encode_line, record_name
from evomerge.records import Block, Final, Header, Trial


class Journal:
    """The records of one run, in memory and on the disk; made by `create`, `open` or `load`.

    Attributes:
        path: The file.
        header: What the run started from.
        trials: The trials in line order, which is the order of their arrival.
        trials_by_number: The same trials by their number.
        blocks: Evaluations on single blocks of documents by (trial, block), where candidates race.
        finals: The final evaluations in line order.
        notes: What was found and healed at the end of the file, one sentence each.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self.trials: list[Trial] = []
        self.trials_by_number: dict[int, Trial] = {}
        self.blocks: dict[tuple[int, int], Block] = {}
        self.finals: list[Final] = []
        self.notes: list[str] = []
        self._names: set[str] = set()
        self._length = 0
        self._fd: int | None = None

    @classmethod
    def create(cls, path: str | Path, header: Header) -> Journal:
        """Start the journal of a new run in an existing folder.

        Raises:
            RunExistsError: The file exists and is not empty.
            EvomergeError: The file cannot be written.
        """
        journal, line = cls(Path(path), header), encode_line(header)
        if os.fstat(journal._open_to_append(os.O_CREAT)).st_size:
            journal.close()
            raise RunExistsError(
                f"{path}: this folder already holds a run; continue it with "
                f"`evomerge resume {journal.path.parent}`, or choose another folder with --run-dir"
            )
        journal._write(line, header)
        return journal

    @classmethod
    def open(cls, path: str | Path) -> Journal:
        """Read a journal to continue its run, under the run's lock; a cut-off last line is moved aside.

        Raises:
            ConfigurationError: There is no such file.
            JournalDamagedError: More than a cut-off last line is wrong; nothing was changed.
            RefusedError: The format is unknown, or the run never started.
            EvomergeError: The file cannot be read or written.
        """
        journal, torn = _read(Path(path))
        fd = journal._open_to_append()
        try:
            if torn:
                backup = _back_up(journal.path, torn)
                journal.notes.append(
                    f"the last line of {journal.path.name} was cut off by a crash; its {len(torn)} bytes "
                    f"were moved to {backup.name} and what it recorded will be evaluated again"
                )
                os.ftruncate(fd, journal._length)
            # A record written just before a kill was read back from memory; here it reaches the disk.
            os.fsync(fd)
        except OSError as error:
            journal.close()
            raise file_error(journal.path, error) from error
        return journal

    @classmethod
    def load(cls, path: str | Path) -> Journal:
        """Read a journal without changing it, even while a run writes it; raises the same as `open`."""
        journal, torn = _read(Path(path))
        if torn:
            journal.notes.append(
                f"the last line of {journal.path.name} is incomplete ({len(torn)} bytes) and is ignored"
            )
        return journal

    def append(self, record: Trial | Block | Final) -> None:
        """Record a trial, a block of one or a final evaluation; it is on the disk when this returns.

        An error of writing closes the journal: what the file then holds is known by opening it again.

        Raises:
            ValueError: The record exists already or holds a number that is not finite, or the journal is
                read-only or closed. Nothing was written.
            EvomergeError: The disk is full or fails. What was recorded before is safe.
        """
        if self._fd is None:
            raise ValueError(f"{self.path} is read-only or closed; use Journal.open to continue it")
        line = encode_line(record)
        # Kept as it will be read back, so that a resumed run sees exactly what this one saw.
        kept = decode_line(line[:-1])
        self._check_new(kept)
        self._write(line, kept)

    def close(self) -> None:
        """Stop recording; what was read stays usable."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_new(self, record: Record) -> None:
        if record_name(record) in self._names:
            raise ValueError(f"{record_name(record)} is recorded already")

    def _keep(self, record: Record) -> None:
        self._names.add(record_name(record))
        if isinstance(record, Trial):
            self.trials.append(record)
            self.trials_by_number[record.number] = record
        elif isinstance(record, Block):
            self.blocks[record.trial, record.block] = record
        elif isinstance(record, Final):
            self.finals.append(record)

    def _open_to_append(self, flags: int = 0) -> int:
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o644)
        except OSError as error:
            raise file_error(self.path, error) from error
        return self._fd

    def _write(self, line: bytes, record: Record) -> None:
        assert self._fd is not None
        try:
            rest = memoryview(line)
            while rest:  # one write, unless the disk takes only a part: then the next one says why
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
            if isinstance(record, Header):
                _sync_folder(self.path.parent)
            self._length += len(line)
            self._keep(record)
        except OSError as error:
            with suppress(OSError):  # a line that cannot be withdrawn is healed by `open`
                os.ftruncate(self._fd, self._length)
                os.fsync(self._fd)
            self.close()
            raise file_error(self.path, error) from error
        except BaseException:  # interrupted between file and memory: only reading again tells the truth
            self.close()
            raise


def _read(path: Path) -> tuple[Journal, bytes]:
    """Read a journal; also return the bytes that a crash left behind its last record."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        reason = "no such journal, so this folder holds no run; start one with `evomerge run`"
        raise ConfigurationError(Fault(file=str(path), path="", reason=reason)) from error
    except OSError as error:
        raise file_error(path, error) from error
    *lines, rest = data.split(b"\n")
    # Only the line being written can be cut off, as each is on the disk before the next. Either it lacks its
    # end, or it holds NUL bytes where the file grew before its content arrived; JSON has no raw NUL.
    if not rest and lines and b"\0" in lines[-1]:
        lines.pop()
    if not lines:
        raise RefusedError(
            f"{path}: this run never started: its first line is {'cut off' if data else 'missing'} and "
            f"nothing is recorded; remove the folder {path.parent} and use `evomerge run` again"
        )
    journal: Journal | None = None
    for number, line in enumerate(lines, 1):
        try:
            record = decode_line(line)
            if journal is not None:
                journal._check_new(record)
            elif isinstance(record, Header):
                journal = Journal(path, record)
            else:
                raise ValueError(f"the header was expected, found {record_name(record)}")
            journal._keep(record)
        except ValueError as error:
            raise JournalDamagedError(
                f"{path}: line {number} of {len(lines)} is damaged: {error}; nothing was changed. Restore "
                "this line from a backup of the file"
            ) from error
    assert journal is not None
    journal._length = sum(len(line) + 1 for line in lines)
    return journal, data[journal._length :]


def _back_up(path: Path, torn: bytes) -> Path:
    number = 1
    while (backup := path.with_name(f"{path.name}.torn-{number}")).exists():
        number += 1
    try:
        with backup.open("xb") as file:
            file.write(torn)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            backup.unlink()
        raise
    return backup


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(fd)


def file_error(path: Path, error: OSError) -> EvomergeError:
    """Say what an error of the system means for a run, of which `path` is one file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EvomergeError(
            f"{path}: the disk is full ({error.strerror}); nothing that was recorded is lost: free some "
            f"space, then continue with `evomerge resume {path.parent}`"
        )
    return EvomergeError(
        f"{error.filename or path}: cannot read or write the file: {error.strerror or error}"
    )
