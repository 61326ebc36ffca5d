"""Running the command line in this process, as `main` does it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from evomerge.cli import main
from tests.tiny import make_experiment


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `evomerge ARGUMENTS` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return call


def call(*arguments: object) -> Result:
    """Run `evomerge ARGUMENTS` in the working directory."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evomerge", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ending:
                code = ending.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def experiment(tmp_path: Path, tiny_zoo: Path) -> Path:
    """A small experiment over the tiny zoo."""
    return make_experiment(tmp_path, tiny_zoo)
