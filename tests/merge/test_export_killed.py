"""SIGKILL at any moment of an export leaves no folder that looks complete, and does not stop the next one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.checkpoints.manifest import verify_manifest

from .zoo import assert_same, merged, recipe, tensors

RECIPE = "models: [{model: $one}, {model: $two}]\nmerge_method: linear\nparameters: {weight: 1}\n"
NUM_KILLS = 25

KILLED = """
import os, signal, sys
from pathlib import Path
from evomerge.merge import memory, streaming
from evomerge.merge.export import export_model
from evomerge.merge.load import open_models
from evomerge.recipe import Recipe

memory.BUFFER_BYTES = 4096
recipe, out, at = Recipe.read(Path(sys.argv[1])), Path(sys.argv[2]), [int(text) for text in sys.argv[3:]]
checkpoints = open_models(recipe, Path("/"))

def counting(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

# Steps on the disk and of the computation, in both threads.
os.write, os.fsync, os.mkdir = counting(os.write), counting(os.fsync), counting(os.mkdir)
Path.rename, streaming.prepare_tensor = counting(Path.rename), counting(streaming.prepare_tensor)
for number in at:
    left = number
    child = os.fork()
    if child == 0:
        export_model(recipe, checkpoints, out, shard_bytes=30_000)
        print(-left, flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("died" if status == -signal.SIGKILL else f"ended {status}", out.exists(), flush=True)
    if out.exists():
        break
"""


def run(file: Path, out: Path, at: list[int]) -> list[str]:
    command = [sys.executable, "-c", KILLED, str(file), str(out), *map(str, at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def file(tiny_zoo: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(recipe(RECIPE, tiny_zoo).to_yaml())
    return path


def test_kill_9_at_random_steps(file: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    steps, outcome = run(file, tmp_path / "whole", [0])
    assert outcome == "ended 0 True"
    folder = tmp_path / "work"
    folder.mkdir()
    # The last fsync makes the finished name durable: after that the folder is there.
    moments = random.Random(7).sample(range(1, int(steps) - 1), NUM_KILLS)
    assert run(file, folder / "out", moments) == ["died False"] * NUM_KILLS
    left = os.listdir(folder)  # noqa: PTH208
    assert left
    assert all(name.startswith(".out.staging-") for name in left)
    assert run(file, folder / "out", [0])[-1] == "ended 0 True"
    assert os.listdir(folder) == ["out"]  # noqa: PTH208
    verify_manifest(folder / "out")
    assert_same(tensors(folder / "out"), merged(recipe(RECIPE, tiny_zoo)), exact=True)


def test_kill_9_of_the_command_at_random_times(file: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    script = "import sys; sys.argv[0] = 'evomerge'; from evomerge.cli import main; main()"
    command = [sys.executable, "-c", script, "merge", str(file), str(folder / "out")]
    draws = random.Random(3)
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draws.uniform(0.1, 3.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (folder / "out").exists():
            verify_manifest(folder / "out")
            break
    else:
        subprocess.run(command, check=True, capture_output=True)
    assert os.listdir(folder) == ["out"]  # noqa: PTH208
    assert_same(tensors(folder / "out"), merged(recipe(RECIPE, tiny_zoo)), exact=True)
