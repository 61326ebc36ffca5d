"""The gate beside the tests: format, lint, types, import contracts. One command runs it all, here and in CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["mypy"],
        ["lint-imports"],
        ["mkdocs", "build", "--strict", "--quiet", "--site-dir", "{scratch}"],
    ],
    ids=["format", "lint", "types", "import contracts", "docs"],
)
def test_the_tree_passes(command: list[str], tmp_path: Path) -> None:
    command = [part.format(scratch=tmp_path) for part in command]
    program = Path(sys.executable).with_name(command[0])
    found = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{' '.join(command)}\n{found.stdout}{found.stderr}"
