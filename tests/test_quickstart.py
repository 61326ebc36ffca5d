"""The main job as a stranger runs it: the README's quickstart on Ray, checked by lm-eval and mergekit themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "experiments" / "quickstart"
BIN = Path(sys.executable).parent


def run(command: list[str] | str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's programs first on the path."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        shell=isinstance(command, str),
        **options,
    )
    assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run directory and output of the quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = re.search(r"evomerge run \S+", (ROOT / "README.md").read_text())
    assert command is not None
    run_dir = folder / "run"
    result = run([*command[0].split(), "--run-dir", str(run_dir)], cwd=ROOT)
    return run_dir, result.stdout


def test_the_winner_beats_every_source_and_baseline_on_the_holdout(finished: tuple[Path, str]) -> None:
    status = json.loads(run(["evomerge", "status", str(finished[0]), "--json"]).stdout)
    table = status["holdout"]
    means = {row["name"]: row["fitness"]["mean"] for row in table["rows"]}
    for source in ("base", "maths", "words", "kana"):
        assert means["winner"] >= means[source] + 0.3
    assert means["winner"] > means["uniform average"]
    assert table["tests"]["uniform average"]["p_value"] < 0.05
    assert table["test"]["p_value"] < 0.05


def test_stock_lm_eval_and_mergekit_agree_with_the_run(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    export, *checks = [line.strip() for line in output.partition("lm-eval itself:\n")[2].splitlines()]
    run(export, cwd=ROOT)
    rows = json.loads((run_dir / "status.json").read_text())["holdout"]["rows"]
    assert len(checks) == 2
    for check in checks:
        task = re.search(r"--tasks (\w+)_holdout", check)
        assert task is not None
        scored = run(f"{check} --output_path {run_dir}/stock-{task[1]}")
        assert scored.stdout
        (file,) = (run_dir / f"stock-{task[1]}").rglob("results_*.json")
        stock = json.loads(file.read_text())["results"][f"{task[1]}_holdout"]["exact_match,none"]
        assert stock == rows[0]["metrics"][f"{task[1]} exact_match"]

    from safetensors.torch import load_file

    run(["mergekit-yaml", str(run_dir / "best" / "recipe.yml"), str(run_dir / "mergekit"), "--quiet"])
    ours = load_file(run_dir / "best" / "model" / "model.safetensors")
    theirs = load_file(run_dir / "mergekit" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.equal(theirs[name]), name


def test_the_zoo_is_small_and_its_documents_do_not_overlap() -> None:
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) < 4 * 2**20
    for task in ("kana_sum", "kana_mirror"):
        search, holdout = (
            {
                json.loads(line)["prompt"]
                for line in (ZOO / "data" / f"{task}.{part}.jsonl").read_text().splitlines()
            }
            for part in ("search", "holdout")
        )
        assert len(search) == 128
        assert len(holdout) == 300
        assert not search & holdout


def test_the_data_are_what_the_training_script_writes(tmp_path: Path) -> None:
    run([sys.executable, str(ZOO / "train.py"), "--data-only", "--out", str(tmp_path)])
    for file in sorted((ZOO / "data").glob("*.jsonl")):
        assert (tmp_path / "data" / file.name).read_bytes() == file.read_bytes()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in readme
    assert "pip install -q -c constraints.txt -e '.[test]'\npytest\n" in ci
