"""A model's folder is opened completely, or refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import evomerge
from evomerge.checkpoints.reader import Checkpoint, contained
from evomerge.errors import CheckpointError

from .files import CONFIG, index, model, sharded, tensors

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_shards(folder: Path) -> Path:
    state = tensors(4)
    names = list(state)
    return sharded(folder, {A: {n: state[n] for n in names[:2]}, B: {n: state[n] for n in names[2:]}})


def hub_snapshot(cache: Path, make: Any = model) -> Path:
    """Move a model's files to `blobs` and link to them, as the hub's cache does."""
    repo = cache / "models--owner--name"
    snapshot = make(repo / "snapshots" / "0123456789abcdef")
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / f"{number:064x}")
        file.symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot


def test_a_model_in_one_file_is_opened(tmp_path: Path) -> None:
    state = tensors(12)
    checkpoint = Checkpoint.open(model(tmp_path / "m", state))
    assert checkpoint.config == CONFIG
    assert list(checkpoint.tensors) == sorted(state)
    assert checkpoint.nbytes == 12 * 6 * 4
    for name in state:
        torch.testing.assert_close(checkpoint.tensor(name), state[name], rtol=0, atol=0)


def test_a_model_in_shards_is_opened(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(two_shards(tmp_path / "m"))
    for name, tensor in tensors(4).items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_single_file_may_have_another_name(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert list(Checkpoint.open(folder).tensors) == sorted(tensors())


def test_a_tensor_is_a_view_of_the_file_and_not_a_copy(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model(tmp_path / "m"))
    first, second = (checkpoint.tensor("model.layers.0.w") for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_opening_reads_no_tensor_and_imports_no_torch(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    code = f"""
import sys
from pathlib import Path
import evomerge.checkpoints.architecture, evomerge.checkpoints.reference
import evomerge.checkpoints.tokenizer, evomerge.checkpoints.writer
from evomerge.checkpoints.reader import Checkpoint
Checkpoint.open(Path({str(folder)!r})).content_hash()
print(sorted({{"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_elements_are_read_into_memory(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model(tmp_path / "m"))
    expected = checkpoint.tensor("model.layers.1.w").view(-1)
    for first, count in [(0, 6), (2, 3), (5, 1), (6, 0)]:
        found = torch.zeros(count)
        checkpoint.read("model.layers.1.w", first, found.numpy())
        assert torch.equal(found, expected[first : first + count])
    with pytest.raises(CheckpointError, match="no tensor named 'x'"):
        checkpoint.read("x", 0, torch.zeros(1).numpy())
    model(tmp_path / "m", {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.w' cannot be read: the file changed"):
        checkpoint.read("model.layers.1.w", 0, torch.zeros(6).numpy())


def test_an_unknown_tensor_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"'model.layer.0.w' \(did you mean 'model.layers.0.w'\?\)"):
        checkpoint.tensor("model.layer.0.w")


def test_a_file_that_changed_after_opening_is_noticed(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    model(folder, {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()})
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        checkpoint.tensor("model.layers.0.w")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(folder=folder, config={}, tensors=checkpoint.tensors, files=()).tensor("model.layers.0.w")


# What a folder must have.


def test_a_missing_config_is_refused_and_the_content_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json.*the folder has model\.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
    ],
)
def test_a_damaged_config_is_refused(config: str, reason: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{reason}"):
        Checkpoint.open(folder)


def test_infinity_in_a_config_is_accepted_as_transformers_writes_it(tmp_path: Path) -> None:
    config = {"time_step_limit": [0.0, float("inf")]}
    assert Checkpoint.open(model(tmp_path / "m", config=config)).config == config


def test_code_in_a_model_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", config={"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}})
    with pytest.raises(CheckpointError, match=r"auto_map names code .* not run"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_alone_are_refused(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(
        CheckpointError, match=r"pickle weights are not loaded.*convert the model to safetensors"
    ):
        Checkpoint.open(folder)


def test_pickle_weights_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert Checkpoint.open(folder).tensors


def test_an_adapter_is_refused_as_such(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="this is an adapter"):
        Checkpoint.open(folder)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=f"several weight files.*{A}.*no model.safetensors.index.json"):
        Checkpoint.open(folder)


def test_a_folder_without_weights_or_tensors_or_no_folder_at_all_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {})
    with pytest.raises(CheckpointError, match="hold no tensors"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="expected a model's folder, found a file"):
        Checkpoint.open(folder / "config.json")
    with pytest.raises(CheckpointError, match="expected a model's folder, found nothing"):
        Checkpoint.open(tmp_path / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no .*the folder has config\.json"):
        Checkpoint.open(folder)


# Index and headers must agree.


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def test_a_tensor_that_the_index_promises_and_the_file_lacks_is_named(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    index(folder, {**weight_map(folder), "model.layers.9.w": A})
    with pytest.raises(CheckpointError, match=rf"'model\.layers\.9\.w' is not in {A}"):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    kept = weight_map(folder)
    del kept["model.layers.1.w"]
    index(folder, kept)
    with pytest.raises(
        CheckpointError, match=rf"{A} holds tensor 'model\.layers\.1\.w', which is not listed"
    ):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    save_file(tensors(4), folder / B)
    with pytest.raises(CheckpointError, match=rf"{B} holds tensor 'model\.layers\.0\.w'"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    (folder / B).unlink()
    with pytest.raises(CheckpointError, match=f"{B} is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", [{}, [], {"a": 3}, None])
def test_an_index_of_another_form_is_refused(content: Any, tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    index(folder, content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(folder)


# No file outside the folder.


@pytest.mark.parametrize(
    "escape", ["../other/model.safetensors", "{absolute}", "sub/model.safetensors", "..", ""]
)
def test_an_index_cannot_name_a_path(escape: str, tmp_path: Path) -> None:
    other = model(tmp_path / "other")
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    name = escape.format(absolute=other / "model.safetensors")
    index(folder, dict.fromkeys(tensors(), name))
    with pytest.raises(CheckpointError, match="must be the name of a file in this folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_link_that_leaves_the_folder_is_refused(file: str, tmp_path: Path) -> None:
    other, folder = model(tmp_path / "other"), model(tmp_path / "m")
    (folder / file).unlink()
    (folder / file).symlink_to(other / file)
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(folder)


def test_a_shard_that_links_outside_is_refused(tmp_path: Path) -> None:
    other, folder = two_shards(tmp_path / "other"), two_shards(tmp_path / "m")
    (folder / B).unlink()
    (folder / B).symlink_to(other / B)
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(folder)


def test_a_folder_behind_a_link_is_opened(tmp_path: Path) -> None:
    model(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    assert Checkpoint.open(tmp_path / "link").tensors


@pytest.mark.parametrize("make", [model, two_shards])
def test_the_layout_of_the_hub_cache_is_accepted(make: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(hub_snapshot(tmp_path, make))
    assert torch.equal(checkpoint.tensor("model.layers.0.w"), tensors()["model.layers.0.w"])


def test_a_link_from_one_cached_model_into_another_is_refused(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "a")
    other = hub_snapshot(tmp_path / "b")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to((other / "model.safetensors").resolve())
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(snapshot)


def test_a_link_to_blobs_is_accepted_in_a_snapshot_only(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    moved = snapshot.parents[1] / "elsewhere" / snapshot.name
    moved.parent.mkdir()
    snapshot.rename(moved)
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(moved)


def test_something_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("x", "pipe"):
        with pytest.raises(CheckpointError, match="expected a file, found"):
            contained(tmp_path, name)


# Content hash.


def test_the_content_hash_is_that_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    first, second = (Checkpoint.open(model(tmp_path / name)).content_hash() for name in "ab")
    assert first == second
    assert Checkpoint.open(hub_snapshot(tmp_path)).content_hash() == first


def test_the_content_hash_follows_weights_config_and_file_names(tmp_path: Path) -> None:
    hashes = {
        Checkpoint.open(folder).content_hash()
        for folder in (
            model(tmp_path / "a"),
            model(tmp_path / "b", tensors(seed=1)),
            model(tmp_path / "c", config={**CONFIG, "rope_theta": 1}),
            two_shards(tmp_path / "d"),
        )
    }
    assert len(hashes) == 4
    folder = model(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert Checkpoint.open(folder).content_hash() not in hashes


def test_the_content_hash_ignores_files_that_are_not_the_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = Checkpoint.open(folder).content_hash()
    (folder / "README.md").write_text("hello")
    assert Checkpoint.open(folder).content_hash() == before
