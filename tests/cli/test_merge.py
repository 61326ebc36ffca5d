"""`evomerge merge`: whatever is wrong with a model ends with a message, a code, and no output."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import evomerge
from evomerge.merge.native import NativeTensor
from evomerge.merge.plan import TensorPlan
from tests.checkpoints.files import raw
from tests.cli.conftest import Command

RECIPE = "models: [{{model: {zoo}/one}}, {{model: bad}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"


@pytest.fixture
def bad(tiny_zoo: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged, and a recipe that uses it."""
    (tmp_path / "recipe.yml").write_text(RECIPE.format(zoo=tiny_zoo))
    return Path(shutil.copytree(tiny_zoo / "two", tmp_path / "bad"))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def header(folder: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = weights(folder).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def truncated(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])


def header_bomb(folder: Path) -> None:
    weights(folder).write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(100))


def overlapping(folder: Path) -> None:
    entries, data = header(folder)
    entries["model.norm.weight"]["data_offsets"] = [0, 64]
    raw(weights(folder), entries, data)


def huge_shape(folder: Path) -> None:
    entries, data = header(folder)
    entries["model.norm.weight"]["shape"] = [2**62, 2**62]
    raw(weights(folder), entries, data)


def escaping_index(folder: Path) -> None:
    names = list(load_file(weights(folder)))
    weights(folder).rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(folder: Path) -> None:
    state = load_file(weights(folder))
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, weights(folder))


def other_shape(folder: Path) -> None:
    state = load_file(weights(folder))
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(state, weights(folder))


def not_a_number(folder: Path) -> None:
    state = load_file(weights(folder))
    state["model.layers.2.mlp.up_proj.weight"][1, 3] = float("nan")
    save_file(state, weights(folder))


def pickled(folder: Path) -> None:
    weights(folder).write_bytes(b"PK\x03\x04" + bytes(100))


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncated, ["model.safetensors", "the file is truncated: tensor"]),
        (header_bomb, ["model.safetensors", "the header claims 1099511627776 bytes"]),
        (overlapping, ["model.safetensors", "tensor 'model.norm.weight'", "overlap"]),
        (huge_shape, ["model.safetensors", "tensor 'model.norm.weight'", "needs"]),
        (
            escaping_index,
            [
                "model.safetensors.index.json: tensor 'lm_head.weight'",
                "'../elsewhere.safetensors'",
                "not a path",
            ],
        ),
        (missing_tensor, ["bad: model.layers.{}.mlp.up_proj.weight", "missing"]),
        (other_shape, ["model.layers.2.mlp.up_proj.weight", "bad [3, 5]"]),
        (
            not_a_number,
            [
                "model.layers.2.mlp.up_proj.weight: the merged tensor holds NaN or infinity, as bad does",
                "element 35 of model.layers.2.mlp.up_proj.weight in",
                "bad/model.safetensors is nan",
            ],
        ),
        (pickled, ["model.safetensors", "this is a pickle"]),
        (remote_code, ["config.json", "auto_map names code"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_hostile_or_broken_model_is_named_and_leaves_nothing(
    damage: Callable[[Path], None], expected: list[str], bad: Path, command: Command, tmp_path: Path
) -> None:
    damage(bad)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = command("merge", "recipe.yml", "out")
    assert result.code == 2
    for part in expected:
        assert part in result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 2000
    assert result.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_that_shrinks_while_it_is_merged_is_an_error(
    bad: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.merge import batches

    real = batches.prepare_native

    def shrink(plan: TensorPlan, *rest: Any, **options: Any) -> NativeTensor:
        if plan.name == "model.layers.2.mlp.up_proj.weight":
            truncated(bad)
        return real(plan, *rest, **options)

    monkeypatch.setattr(batches, "prepare_native", shrink)
    result = command("merge", "recipe.yml", "out")
    assert result.code == 2
    assert "bad/model.safetensors: tensor" in result.err
    assert "changed since the checkpoint was opened" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "recipe.yml"]


WITHOUT_TORCH = """
import sys
from evomerge.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "tokenizers", "safetensors"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "method",
    [
        "linear\nparameters: {weight: 1}",
        "ties\nbase_model: $base\nparameters: {weight: 1, density: 0.5}",
        "dare_ties\nbase_model: $base\nparameters: {weight: 1, density: 0.5}",
        "slerp\nbase_model: $one\nparameters: {t: 0.5}",
    ],
    ids=lambda text: text.split("\n")[0],
)
def test_ordinary_merges_do_not_wait_for_torch(method: str, tiny_zoo: Path, tmp_path: Path) -> None:
    text = f"models: [{{model: $one}}, {{model: $two}}]\nmerge_method: {method}\n"
    (tmp_path / "recipe.yml").write_text(text.replace("$", f"{tiny_zoo}/"))
    command = [sys.executable, "-c", WITHOUT_TORCH, "merge", "recipe.yml", "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "out\n[]\n"), done.stderr


def test_the_search_for_garbage_goes_on_after_a_merge(bad: Path, command: Command) -> None:
    assert gc.isenabled()
    assert command("merge", "recipe.yml", "out").code == 0
    assert gc.isenabled()
    assert command("merge", "recipe.yml", "out").code != 0
    assert gc.isenabled()


def test_options_reach_the_merge(bad: Path, command: Command, tmp_path: Path) -> None:
    result = command("merge", "recipe.yml", "out", "--shard-size", "20KB", "--memory-budget", "8MiB")
    assert result.code == 0, result.err
    assert result.out == "out\n"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert command("merge", "recipe.yml", "whole").code == 0
    parts = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory-budget", "1KB"], "--memory-budget: these models need at least"),
        (["--memory-budget", "much"], "expected a size such as 500MB or 2GB, got 'much'"),
        (["--shard-size", "0"], "expected a size"),
        (["--device", "cuda:77"], "--device: this machine has"),
        (["--device", "abacus"], "--device: expected cpu or cuda, got 'abacus'"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: list[str], expected: str, bad: Path, command: Command, tmp_path: Path
) -> None:
    result = command("merge", "recipe.yml", "out", *options)
    assert result.code == 2
    assert expected in result.err
    assert not (tmp_path / "out").exists()


def test_no_secret_of_the_environment_is_written(
    bad: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "hf_CANARY0123456789"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, canary)
    result = command("merge", "recipe.yml", "out")
    assert result.code == 0
    assert canary not in result.out + result.err
    for file in (tmp_path / "out").iterdir():
        assert canary.encode() not in file.read_bytes()


def test_a_file_of_several_recipes_is_merged_and_validated(
    bad: Path, command: Command, tmp_path: Path, tiny_zoo: Path
) -> None:
    text = f"name: left\n{RECIPE.format(zoo=tiny_zoo)}---\n"
    text += f"models: [{{model: left}}, {{model: {tiny_zoo}/three}}]\nmerge_method: linear\n"
    (tmp_path / "multi.yml").write_text(text + "parameters: {weight: 1}\n")
    valid = command("validate", "multi.yml")
    assert (valid.code, valid.out) == (0, "multi.yml: valid file of 2 recipes\n")
    result = command("merge", "multi.yml", "out", "--intermediate-dir", "kept")
    assert result.code == 0
    assert "note: merging left" in result.err
    again = command("merge", "multi.yml", "again", "--intermediate-dir", "kept")
    assert "note: kept/left is used as it is" in again.err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    (tmp_path / "multi.yml").write_text(text + "parameters: {wieght: 1}\n")
    assert command("validate", "multi.yml").code == 2


def test_warnings_about_tokens_are_shown(bad: Path, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(file.read_text() + 'chat_template: "<|nobody|>{{ messages }}"\n')
    result = command("merge", "recipe.yml", "out")
    assert result.code == 0
    assert "warning: recipe.yml:4: chat_template: the template uses 1 token ('<|nobody|>')" in result.err
