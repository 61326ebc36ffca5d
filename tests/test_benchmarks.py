"""The benchmarks run, on models too small to measure anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "columns"),
    [
        (["candidate.py", "--sizes", "tiny"], 8),
        (["against_mergekit.py", "--size", "tiny"], 4),
        (["evaluation.py", "--limit", "4", "--rounds", "1"], 8),
        (["merge_command.py", "FOLDER", "--size", "tiny", "--budget", "20MB", "--rounds", "1"], 5),
    ],
    ids=["candidate", "against_mergekit", "evaluation", "merge_command"],
)
def test_a_benchmark_writes_its_table(script: list[str], columns: int, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    name, *arguments = (str(tmp_path / "zoo") if part == "FOLDER" else part for part in script)
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line for line in out.read_text().splitlines() if line.startswith("|")]
    assert rows
    assert all(line.count("|") == columns + 1 for line in (head, *rows))
    assert "Measured on 20" in out.read_text()
