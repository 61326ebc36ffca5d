"""Every error evomerge raises on purpose, with the exit code the command line ends with.

    EvomergeError                      1
    ├── ConfigurationError             2   a file of the user's is wrong; carries every fault found
    │   ├── CheckpointError            2   a model or one of its files cannot be used
    │   └── TaskError                  2   an evaluation task cannot be used as asked
    ├── RefusedError                   3   going on could destroy or falsify something
    │   ├── RunExistsError             3   the run directory already holds a run
    │   ├── RunLockedError             3   another controller works in the run directory
    │   ├── InputsChangedError         3   experiment, models or data differ from those recorded
    │   ├── JournalDamagedError        3   the journal is damaged before its last line
    │   └── ReplayMismatchError        3   a replayed search proposes other genomes than recorded
    ├── FitnessError                   1   a function or judge of the user's has no score for a model
    │   └── ChangedModelError          1   a function of the user's changed the model it was lent
    ├── NoValidCandidateError          4   a whole generation without one valid candidate
    ├── WorkerError                    1   the workers cannot be started or keep dying
    └── RunStoppedError               75   stopped on request or for want of a judge; `evomerge resume` continues

A message names the field, what was expected, what came, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class EvomergeError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong in a file of the user's.

    Attributes:
        path: Dotted path of the field, such as `objectives.0.metric`; empty for the whole file.
        reason: What was expected, what came, and what to do.
        file: The file as the user named it, or None for input without a file.
        line: Line of the field, counted from 1, or None when unknown.
    """

    path: str
    reason: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return ": ".join(part for part in (where, self.path, self.reason) if part)


class ConfigurationError(EvomergeError):
    """A file of the user's cannot be used; `faults` lists everything found at once."""

    exit_code = 2

    def __init__(self, faults: Sequence[Fault] | Fault | str) -> None:
        if isinstance(faults, str):
            faults = [Fault(path="", reason=faults)]
        elif isinstance(faults, Fault):
            faults = [faults]
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)


class CheckpointError(ConfigurationError):
    """A model, or one of its files or tensors, cannot be used."""


class TaskError(ConfigurationError):
    """An evaluation task, metric or document set cannot be used as asked."""


class RefusedError(EvomergeError):
    """Going on could destroy or falsify something; nothing was changed."""

    exit_code = 3


class RunExistsError(RefusedError):
    """The run directory already holds a run."""


class RunLockedError(RefusedError):
    """Another controller works in the run directory."""


class InputsChangedError(RefusedError):
    """The experiment, a model or the data differ from what the journal recorded."""


class JournalDamagedError(RefusedError):
    """The journal is damaged before its last line."""


class ReplayMismatchError(RefusedError):
    """A replayed search proposes other genomes than the journal recorded."""


class FitnessError(EvomergeError):
    """A function or a judge of the user's has no score for a model."""


class ChangedModelError(FitnessError):
    """A function of the user's changed the model it was lent."""


class NoValidCandidateError(EvomergeError):
    """A whole generation brought no valid candidate."""

    exit_code = 4


class WorkerError(EvomergeError):
    """The workers cannot be started, or keep dying."""


class RunStoppedError(EvomergeError):
    """The run was stopped, on request or because its judge is out of reach, and can be resumed."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
