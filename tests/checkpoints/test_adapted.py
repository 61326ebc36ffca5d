"""A model with an adapter is merged once, kept while nothing changes, and never found half made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import adapted as module
from evomerge.checkpoints.adapted import adapted
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.writer import verify_manifest
from evomerge.errors import CheckpointError, EvomergeError
from tests.adapters import edit, make_adapter
from tests.tiny import make_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    model = make_model(folder / "model", seed=0, num_hidden_layers=2)
    make_adapter(folder / "adapter", model, target_modules=["q_proj"])
    return folder


@pytest.fixture
def model(tmp_path: Path, originals: Path) -> Path:
    return Path(shutil.copytree(originals / "model", tmp_path / "model"))


@pytest.fixture
def adapter(tmp_path: Path, originals: Path) -> Path:
    return Path(shutil.copytree(originals / "adapter", tmp_path / "adapter"))


def kept(cache: Path) -> list[str]:
    """Everything in the cache but locks."""
    return sorted(path.name for path in (cache / "adapters").iterdir() if not path.name.endswith(".lock"))


def test_the_result_is_a_complete_checkpoint_in_the_cache(model: Path, adapter: Path, cache: Path) -> None:
    folder = adapted(model, adapter)
    assert folder.parent == cache / "adapters"
    assert kept(cache) == [folder.name]
    verify_manifest(folder)
    assert Checkpoint.open(folder).config == Checkpoint.open(model).config
    names = {path.name for path in model.iterdir()}
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}


def test_it_is_kept_in_the_home_folder_unless_told_otherwise(
    tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVOMERGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert adapted(model, adapter).parent == tmp_path / "home" / ".cache" / "evomerge" / "adapters"


def test_the_second_time_nothing_is_written(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapted(model, adapter)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def refuse(*args: Any) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(module, "_write", refuse)
    assert adapted(model, adapter) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_same_content_elsewhere_is_the_same(tmp_path: Path, model: Path, adapter: Path) -> None:
    others = [shutil.copytree(path, tmp_path / "copies" / path.name) for path in (model, adapter)]
    assert adapted(*map(Path, others)) == adapted(model, adapter)


def change_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    state[min(state)] += 0.25
    save_file(state, file, {"format": "pt"})


def append_space(name: str) -> Any:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text((file.read_text() if file.exists() else "{}") + " ")

    return change


@pytest.mark.parametrize(
    ("which", "change"),
    [
        ("adapter", change_weights),
        ("adapter", lambda folder: edit(folder, lora_alpha=7)),
        ("adapter", append_space("tokenizer.json")),
        ("model", change_weights),
        ("model", append_space("config.json")),
        ("model", append_space("tokenizer.json")),
        ("model", append_space("generation_config.json")),
    ],
)
def test_whatever_changes_gives_a_new_folder_and_leaves_the_old_one(
    model: Path, adapter: Path, cache: Path, which: str, change: Any
) -> None:
    before = adapted(model, adapter)
    change({"adapter": adapter, "model": model}[which])
    after = adapted(model, adapter)
    assert kept(cache) == sorted([before.name, after.name])
    assert before != after
    verify_manifest(before)


def test_a_tokenizer_moved_from_the_adapter_to_the_model_is_another_input(model: Path, adapter: Path) -> None:
    (model / "tokenizer.json").rename(adapter / "tokenizer.json")
    before = adapted(model, adapter)
    (adapter / "tokenizer.json").rename(model / "tokenizer.json")
    assert adapted(model, adapter) != before


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_a_checkpoint_that_lost_a_part_is_made_again(
    model: Path, adapter: Path, cache: Path, damage: str
) -> None:
    folder = adapted(model, adapter)
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "short":
        (folder / "model.safetensors").write_bytes(b"short")
    else:
        (folder / "manifest.json").write_text(json.dumps({"files": ["config.json"]}))
    assert adapted(model, adapter) == folder
    verify_manifest(folder)
    assert kept(cache) == [folder.name]


def test_a_failed_merge_leaves_nothing(model: Path, adapter: Path, cache: Path) -> None:
    last = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit(adapter, lambda state: {**state, last: state[last] * torch.nan})
    with pytest.raises(CheckpointError, match="expected finite numbers"):
        adapted(model, adapter)
    assert kept(cache) == []


def test_a_full_disk_is_found_out_before_anything_is_computed(
    model: Path, adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "updated_tensor", None)
    with pytest.raises(EvomergeError, match=r"needs .* bytes, the disk has 1000 free"):
        adapted(model, adapter)
    assert kept(cache) == []


def test_inputs_that_change_while_they_are_merged_are_noticed(
    model: Path, adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = module.plan_updates

    def plan_and_change(*args: Any) -> Any:
        edit(adapter, lora_alpha=7)
        return plan(*args)

    monkeypatch.setattr(module, "plan_updates", plan_and_change)
    with pytest.raises(CheckpointError, match="changed while they were merged; try again"):
        adapted(model, adapter)
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_named_with_a_remedy(
    tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        EvomergeError, match=r"cannot be written: .*; set EVOMERGE_CACHE to a folder that can"
    ):
        adapted(model, adapter)


# Several processes.

SCRIPT = """
import sys, time
from pathlib import Path
from evomerge.checkpoints import adapted as module
model, adapter, pause, log = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
update = module.updated_tensor
def slow(*args):
    with log.open("a") as stream:
        stream.write("x")
    time.sleep(pause)
    return update(*args)
module.updated_tensor = slow
print("ready", flush=True)
sys.stdin.readline()
print(module.adapted(model, adapter))
"""


def start(model: Path, adapter: Path, pause: float, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(model), str(adapter), str(pause), str(log)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.exists()


def test_of_two_processes_at_once_one_writes_and_both_get_it(
    tmp_path: Path, model: Path, adapter: Path, cache: Path
) -> None:
    log = tmp_path / "log"
    processes = [start(model, adapter, 0.3, log) for _ in range(2)]
    for process in processes:
        go(process)
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (name,) = kept(cache)
    assert answers == [f"{cache / 'adapters' / name}\n"] * 2
    verify_manifest(cache / "adapters" / name)
    assert log.read_text() == "xx", "the model's two q_proj were merged once"


def test_a_killed_merge_leaves_nothing_that_looks_complete_and_the_next_one_cleans_up(
    tmp_path: Path, model: Path, adapter: Path, cache: Path
) -> None:
    log = tmp_path / "log"
    process = start(model, adapter, 60, log)
    go(process)
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (staging,) = kept(cache)
    assert staging.startswith(".")
    with pytest.raises(CheckpointError):
        Checkpoint.open(cache / "adapters" / staging)
    folder = adapted(model, adapter)
    verify_manifest(folder)
    assert kept(cache) == [folder.name]
