"""The state of a run, from its journal alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.experiment import ConstraintSettings, ObjectiveSettings
from evomerge.fitness.constraints import Constraint, as_constraint, source_metrics, with_sources
from evomerge.fitness.objectives import Objective
from evomerge.journal import Journal
from evomerge.lock import is_locked
from evomerge.loop import progress
from evomerge.report.audit import Audit, audit_run
from evomerge.report.front import front_rows
from evomerge.report.holdout import HoldoutTable, holdout_table
from evomerge.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What a run is doing or has found.

    Attributes:
        state: `running`, `finished`, or how it ended (`stopped`, `interrupted`, `failed`, `killed`).
        plain: Name, folder, progress, best trial and front as plain values.
        holdout: Its holdout table, once there is one.
        audit: Its audit.
    """

    state: str
    plain: Mapping[str, Any]
    holdout: HoldoutTable | None
    audit: Audit

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "state": self.state,
            **self.plain,
            "holdout": None if self.holdout is None else self.holdout.to_dict(),
            "audit": self.audit.to_dict(),
        }


def read_status(path: Path) -> RunStatus:
    """State, progress, best trial, front, holdout table and audit of a run.

    Args:
        path: The run directory.

    Raises:
        ConfigurationError: The folder holds no run.
        JournalDamagedError: The journal is damaged before its last line.
    """
    folder = RunDir(path)
    journal = Journal.load(folder.journal)
    written: dict[str, Any] = {}
    if folder.status.is_file():
        written = json.loads(folder.status.read_text(encoding="utf-8"))
    objectives, constraints = read_objectives(journal), read_constraints(journal)
    if any(final.stage != "search" for final in journal.finals):  # the sources were scored before
        objectives, constraints = with_sources(objectives, constraints, source_metrics(journal.finals))
    table = holdout_table(folder, journal.finals, objectives, constraints)
    # The lock comes first: a resumed run still carries the state in which it ended before.
    state = "running" if is_locked(path) else written.get("state")
    if state not in ("running", "finished", "failed", "stopped", "interrupted"):
        state = "killed"
    return RunStatus(
        state=state,
        plain={
            "run_dir": str(path),
            "name": journal.header.settings["name"],
            **progress(journal, _evaluations(journal)),
            "front": front_rows(folder, journal.trials, objectives),
        },
        holdout=table,
        audit=audit_run(folder, journal, objectives, table),
    )


def run_status(path: Path) -> dict[str, Any]:
    """What `read_status` reads, as plain values."""
    return read_status(path).to_dict()


def _evaluations(journal: Journal) -> int:
    settings = journal.header.settings
    searches = [stage["search"] for stage in settings.get("stages", [])] or [settings["search"]]
    return sum(search["evaluations"] for search in searches)


def read_objectives(journal: Journal) -> tuple[Objective, ...]:
    """The objectives as they were resolved when the run started."""
    return tuple(
        Objective(
            task=item.task,
            metric=item.measured or "",
            filter=item.filter or "",
            weight=item.weight,
            maximize=item.direction == "maximize",
            normalize=item.normalize == "sources",
            own=item.own,
        )
        for item in map(ObjectiveSettings.model_validate, journal.header.settings["objectives"])
    )


def read_constraints(journal: Journal) -> tuple[Constraint, ...]:
    """The constraints as they were resolved when the run started."""
    return tuple(
        as_constraint(ConstraintSettings.model_validate(item))
        for item in journal.header.settings.get("constraints", [])
    )
