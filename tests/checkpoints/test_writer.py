"""A written checkpoint is complete under its name, or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import evomerge
from evomerge.checkpoints.header import DTYPES
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.writer import CheckpointWriter, verify_manifest
from evomerge.errors import CheckpointError, EvomergeError, RefusedError

from .files import CONFIG, tensors

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}


def write(out: Path, state: dict[str, torch.Tensor], **options: int) -> Path:
    with CheckpointWriter(out, **options) as writer:
        writer.add_json("config.json", CONFIG)
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.commit()
    return out


def stream_ones(writer: CheckpointWriter, *names: str) -> None:
    with writer.stream([TensorSpec(name=name, dtype="float32", shape=(1,)) for name in names]) as stream:
        for _ in stream.tensors:
            stream.write(torch.ones(1))


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_one_shard_is_one_file_without_an_index(tmp_path: Path) -> None:
    out = write(tmp_path / "new" / "out", tensors(4))
    assert names(out) == ["config.json", "manifest.json", "model.safetensors"]
    assert_same(read(out), tensors(4))
    verify_manifest(out)
    assert names(tmp_path / "new") == ["out"]


@pytest.mark.parametrize(("shard_bytes", "count"), [(24, 5), (47, 5), (48, 3), (1, 5), (120, 1), (119, 2)])
def test_a_shard_is_closed_before_it_exceeds_its_size(shard_bytes: int, count: int, tmp_path: Path) -> None:
    state = dict(reversed(tensors(5).items()))  # 24 bytes each
    out = write(tmp_path / "out", state, shard_bytes=shard_bytes)
    shards = [name for name in names(out) if name.endswith(".safetensors")]
    if count > 1:
        assert shards == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 5 * 24
        assert list(index["weight_map"]) == sorted(state)
    else:
        assert shards == ["model.safetensors"]
    assert_same(read(out), state)
    verify_manifest(out)


def test_every_type_survives(tmp_path: Path) -> None:
    state = {
        name: torch.arange(16, dtype=torch.uint8).view(getattr(torch, dtype.torch_name))
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    state["BOOL"] = torch.tensor([True, False])
    assert_same(read(write(tmp_path / "out", state)), state)


def test_scalars_empty_tensors_views_and_transposes_survive(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "t": base.T,
        "row": base[1],
        "step": base[::2],
    }
    found = read(write(tmp_path / "out", state))
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_two_names_may_share_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"embed": base, "head": base, "part": base[3:6], "again": base.view(3, 4)}
    assert_same(read(write(tmp_path / "out", state)), state)


def test_tensors_of_an_opened_checkpoint_are_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    source = Checkpoint.open(write(tmp_path / "a", tensors(4)))
    with CheckpointWriter(tmp_path / "b") as writer:
        for name in source.tensors:
            writer.add(name, source.tensor(name))
        writer.add_json("config.json", source.config)
        writer.commit()
    assert Checkpoint.open(tmp_path / "b").content_hash() == source.content_hash()


def test_a_tensor_that_needs_gradients_is_written(tmp_path: Path) -> None:
    assert_same(read(write(tmp_path / "out", {"w": torch.nn.Parameter(torch.ones(2))})), {"w": torch.ones(2)})


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = LlamaForCausalLM(config)
    with CheckpointWriter(tmp_path / "out", shard_bytes=4000) as writer:
        writer.add_text("config.json", config.to_json_string(use_diff=False))
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        writer.commit()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(loaded.state_dict(), model.state_dict())


def test_other_files_are_added_and_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "link").symlink_to("tokenizer.json")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("w", torch.ones(1))
        writer.add_text("README.md", "grün")
        writer.add_json("config.json", {"ü": 1})
        writer.copy(tmp_path / "tokenizer.json")
        writer.copy(tmp_path / "link", "merges.txt")
        writer.commit()
    out = tmp_path / "out"
    assert (out / "README.md").read_bytes() == "grün".encode()
    assert json.loads((out / "config.json").read_text()) == {"ü": 1}
    assert (out / "tokenizer.json").read_bytes() == (out / "merges.txt").read_bytes() == b"{}"
    assert not (out / "merges.txt").is_symlink()
    assert sorted(json.loads((out / "manifest.json").read_text())["files"]) == [
        name for name in names(out) if name != "manifest.json"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\0",
        "manifest.json",
        "x.safetensors",
        "model.safetensors.index.json",
        "twice",
    ],
)
def test_a_file_name_that_would_escape_or_clash_is_refused(name: str, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add_text("twice", "")
        with pytest.raises(ValueError, match="file"):
            writer.add_text(name, "")
        with pytest.raises(ValueError, match="file"):
            writer.copy(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("w", torch.ones(1), "must be new"),
        ("", torch.ones(1), "must be new and not empty"),
        ("__metadata__", torch.ones(1), "must be new and not empty"),
        ("c", torch.ones(1, dtype=torch.complex128), "tensor 'c': safetensors files have no complex128"),
    ],
)
def test_a_tensor_that_cannot_be_written_is_refused(
    name: str, tensor: torch.Tensor, reason: str, tmp_path: Path
) -> None:
    with CheckpointWriter(tmp_path / "out") as writer, pytest.raises(ValueError, match=reason):  # noqa: PT012
        writer.add("w", torch.ones(1))
        writer.add(name, tensor)
        writer.commit()
    assert names(tmp_path) == []


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer, pytest.raises(ValueError, match="at least one tensor"):
        writer.commit()
    assert names(tmp_path) == []


# Nothing that looks complete is left behind.


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=1) as writer:
        stream_ones(writer, "a", "b")
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []


def test_an_exception_leaves_nothing_and_passes_through(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out", shard_bytes=1) as writer:
            stream_ones(writer, "a", "b")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


DIE = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from evomerge.checkpoints.writer import CheckpointWriter

def counting(function):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args, **kwargs)
    return call

# Every step that changes what is on the disk is a place to die.
os.fsync, os.mkdir, os.write = counting(os.fsync), counting(os.mkdir), counting(os.write)
Path.rename = counting(Path.rename)
for left in itertools.count():
    child = os.fork()
    if child == 0:
        with CheckpointWriter(Path(sys.argv[1]) / str(left) / "out", shard_bytes=4) as out:
            out.add_json("config.json", {})
            for name in "abc":
                out.add(name, torch.ones(1))
            out.commit()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
    if status != -signal.SIGKILL:
        break
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_kill_9_at_any_step_leaves_no_folder_that_looks_complete(tmp_path: Path) -> None:
    done = python(DIE, tmp_path)
    *deaths, last = map(int, done.stdout.split())
    assert last == 0, done.stderr
    assert deaths == [-signal.SIGKILL] * len(deaths)
    assert len(deaths) >= 16
    for step in range(len(deaths) - 1):
        out = tmp_path / str(step) / "out"
        assert not out.exists()
        leftovers = names(out.parent) if out.parent.exists() else []
        assert all(name.startswith(".out.staging-") for name in leftovers)
        assert_same(read(write(out, tensors())), tensors())
        assert names(out.parent) == ["out"]
    # The last step only makes the finished name durable; the run behind it was not killed.
    for step in (len(deaths) - 1, len(deaths)):
        verify_manifest(tmp_path / str(step) / "out")


def test_an_unfinished_folder_does_not_open_as_a_checkpoint(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=1) as writer:
        writer.add_json("config.json", CONFIG)
        stream_ones(writer, "a", "b")
        (staging,) = tmp_path.iterdir()
        assert len(list(staging.iterdir())) == 3
        with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
            Checkpoint.open(staging)
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
            verify_manifest(staging)


# Nothing is overwritten, and two writers do not meet.


def test_a_target_that_holds_something_is_refused_and_untouched(tmp_path: Path) -> None:
    out = write(tmp_path / "out", tensors())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RefusedError, match=f"{out}: the folder to write to is not empty"):
        write(out, tensors(seed=1))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(RefusedError, match="is a file"):
        write(out / "config.json", tensors())


def test_an_empty_target_is_filled_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", tensors())
    assert_same(read(tmp_path / "real"), tensors())
    assert (tmp_path / "link").is_symlink()


def test_a_target_filled_in_the_meantime_is_refused_at_the_end(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(RefusedError, match="is not empty"):
            writer.commit()
    assert names(tmp_path / "out") == ["mine"]
    assert names(tmp_path) == ["out"]


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as first:
        first.add("a", torch.ones(1))
        with pytest.raises(RefusedError, match=f"process {os.getpid()} is writing to it"):
            write(tmp_path / "out", tensors())
        other = "from evomerge.checkpoints.writer import *; import pathlib, sys"
        done = python(f"{other}; CheckpointWriter(pathlib.Path(sys.argv[1])).__enter__()", tmp_path / "out")
        assert f"RefusedError: {tmp_path / 'out'}: process {os.getpid()} is writing to it" in done.stderr
        write(tmp_path / "out2", tensors())
        first.commit()
    assert_same(read(tmp_path / "out2"), tensors())
    assert names(tmp_path / "out") == ["manifest.json", "model.safetensors"]


def test_only_the_leftovers_of_the_same_target_are_removed(tmp_path: Path) -> None:
    kept = [".out.staging-abc", ".out2.staging-4000000", ".staging-1"]
    for name in [*kept, ".out.staging-4000000", f".out.staging-{os.getpid()}"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00001.partial").touch()
    (tmp_path / ".out.staging-7").touch()
    write(tmp_path / "out", tensors())
    assert names(tmp_path) == sorted([*kept, ".out.staging-7", "out"])


def test_without_file_locks_the_process_number_tells_who_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    (tmp_path / ".out.staging-4194305").mkdir()  # above the largest process number of Linux
    write(tmp_path / "out", tensors())
    assert names(tmp_path) == ["out"]
    (tmp_path / ".new.staging-1").mkdir()
    with pytest.raises(RefusedError, match="process 1 is writing to it"):
        write(tmp_path / "new", tensors())


def test_a_writer_whose_folder_is_cleaned_away_as_it_starts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cleaned(descriptor: int, operation: int) -> None:
        shutil.rmtree(tmp_path / f".out.staging-{os.getpid()}")
        (tmp_path / f".out.staging-{os.getpid()}").mkdir()

    monkeypatch.setattr("fcntl.flock", cleaned)
    with pytest.raises(RefusedError, match="another process starts to write to it; try again"):
        CheckpointWriter(tmp_path / "out").__enter__()


# The disk.


def test_everything_is_durable_before_the_name_and_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(f"{path.relative_to(tmp_path)}{' renamed' if (tmp_path / 'out').exists() else ''}")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "out", tensors(2), shard_bytes=1)
    staging = f".out.staging-{os.getpid()}"
    assert synced == [
        f"{staging}/config.json",
        f"{staging}/model-00001-of-00002.safetensors.partial",
        f"{staging}/model-00002-of-00002.safetensors.partial",
        f"{staging}/model.safetensors.index.json",
        f"{staging}/manifest.json",
        staging,
        ". renamed",
    ]


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path: Path) -> None:
    huge = TensorSpec(name="w", dtype="float32", shape=(2**30, 2**28))
    with (
        pytest.raises(EvomergeError) as caught,
        CheckpointWriter(tmp_path / "out") as writer,
        writer.stream([huge]),
    ):
        pytest.fail("nothing can be written")
    assert "needs 1152921504606847" in str(caught.value)
    assert names(tmp_path) == []


@pytest.fixture
def in_small_disk(tmp_path: Path) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """Runs Python with a file system of 1 MiB at `sys.argv[1]`, beside a file of 2 MiB."""
    (tmp_path / "big").write_bytes(bytes(2**21))
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = f"mount -t tmpfs -o size=1m none {disk}"
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, "sh", "-c", probe], capture_output=True).returncode
    ):
        pytest.skip("needs to mount a small file system in a namespace of its own")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = f'{probe} && exec "$0" -c "$1" {disk}'
        return subprocess.run(
            [*unshare, "sh", "-c", command, sys.executable, code],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("action", "needed"),
    [
        ("grabbed(out)", 800_208),
        ("out.add_text('README.md', 'x' * 2**21)", 2**21),
        ("out.copy(Path(sys.argv[1]).parent / 'big')", 2**21),
        # The file system has room as the shards are begun; another process fills it meanwhile.
        ("late(out)", 800_208),
    ],
)
def test_a_full_disk_is_reported_and_leaves_nothing(
    action: str, needed: int, in_small_disk: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    done = in_small_disk(f"""
import sys
from pathlib import Path
import torch
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.checkpoints import durable
from evomerge.checkpoints.shards import TensorSpec
from evomerge.errors import EvomergeError

def grabbed(out):
    out._free_bytes = lambda: 10**9
    Path(sys.argv[1]).joinpath("out").mkdir()
    hog = Path(sys.argv[1]) / ".hog"
    hog.write_bytes(bytes(600_000))
    try:
        with out.stream([TensorSpec(name=n, dtype="float32", shape=(100_000,)) for n in "ab"]):
            print("the place was not taken at the start")
    finally:
        hog.unlink()
        Path(sys.argv[1]).joinpath("out").rmdir()

def late(out):
    durable._FALLOCATE = None
    specs = [TensorSpec(name=n, dtype="float32", shape=(100_000,)) for n in "ab"]
    with out.stream(specs, buffer_bytes=4096) as stream:
        hog = Path(sys.argv[1]) / ".hog"
        hog.write_bytes(bytes(600_000))
        try:
            for spec in stream.tensors:
                stream.write(torch.ones(spec.shape))
        finally:
            hog.unlink()

try:
    with CheckpointWriter(Path(sys.argv[1]) / "out", shard_bytes=400_000) as out:
        {action}
except EvomergeError as error:
    print(error)
print(list(Path(sys.argv[1]).iterdir()))
""")
    assert done.returncode == 0, done.stderr
    message, left = done.stdout.splitlines()
    assert f"the disk is full; the checkpoint needs at least {needed} bytes" in message
    assert left == "[]"
