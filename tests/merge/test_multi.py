"""Merges of merges equal merging one after the other, and are made again only when something changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import ConfigurationError, EvomergeError, RefusedError
from evomerge.merge.export import export_model
from evomerge.merge.multi import merge_all, read_merges
from evomerge.recipe import Recipe

from .models import variant
from .zoo import assert_same, by_mergekit, tensors

CHAIN = """\
name: left
models: [{model: $one, parameters: {weight: 0.7}}, {model: $two, parameters: {weight: 0.3}}]
merge_method: linear
dtype: float32
out_dtype: bfloat16
---
merge_method: task_arithmetic
base_model: left
models: [{model: right, parameters: {weight: 0.5}}]
dtype: float32
out_dtype: bfloat16
---
name: right
merge_method: slerp
base_model: left
models: [{model: left}, {model: $three}]
parameters: {t: 0.4}
dtype: float32
out_dtype: bfloat16
"""


class Exporter:
    """Exports, and remembers what."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(
        self, recipe: Recipe, models: Mapping[str, Checkpoint], target: Path, merges: Sequence[Recipe]
    ) -> None:
        self.made.append(recipe.name or "final")
        export_model(recipe, models, target, merges=merges)


def write(folder: Path, zoo: Path, text: str = CHAIN) -> Path:
    file = folder / "multi.yml"
    file.write_text(text.replace("$", f"{zoo}/"))
    return file


def run(file: Path, out: Path, **options: Path) -> list[str]:
    export = Exporter()
    merge_all(read_merges(file), out, export, **options)
    return export.made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Semantics.


def test_a_chain_equals_its_documents_merged_one_by_one_by_mergekit(tiny_zoo: Path, tmp_path: Path) -> None:
    chain = CHAIN.replace("out_dtype: bfloat16\n", "")  # roundings in between would add up
    assert run(write(tmp_path, tiny_zoo, chain), tmp_path / "out") == ["left", "right", "final"]
    assert names(tmp_path) == ["multi.yml", "out"]
    left, final, right = chain.replace("$", f"{tiny_zoo}/").split("---\n")
    made = tmp_path / "kit"
    made.mkdir()
    for name, text in (("left", left), ("right", right), ("final", final)):
        lines = [line for line in text.splitlines() if not line.startswith("name:")]
        text = "\n".join(lines)
        for other in ("left", "right"):
            text = text.replace(f"model: {other}", f"model: {made}/{other}")
        by_mergekit(text, made / name)
    ours, theirs = tensors(tmp_path / "out"), tensors(made / "final")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_the_documents_equal_single_merges_bit_for_bit(tiny_zoo: Path, tmp_path: Path) -> None:
    run(write(tmp_path, tiny_zoo), tmp_path / "out")
    left, final, right = CHAIN.replace("$", f"{tiny_zoo}/").split("---\n")
    for name, text in (("left", left), ("right", right), ("final", final)):
        for other in ("left", "right"):
            text = text.replace(f"model: {other}", f"model: {tmp_path}/{other}")
        run(write(tmp_path, tiny_zoo, text), tmp_path / name)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "final"), exact=True)


def test_the_folder_alone_makes_the_model_again(tiny_zoo: Path, tmp_path: Path) -> None:
    run(write(tmp_path, tiny_zoo), tmp_path / "out")
    run(tmp_path / "out" / "mergekit_config.yml", tmp_path / "again")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "again"), exact=True)
    for name in ("mergekit_config.yml", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_merge_carries_only_the_recipes_it_is_made_from(tiny_zoo: Path, tmp_path: Path) -> None:
    file = read_merges(write(tmp_path, tiny_zoo))
    assert [recipe.name for recipe in file.behind(file.final)] == ["left", "right"]
    assert [recipe.name for recipe in file.behind(file.named["right"])] == ["left"]
    assert file.behind(file.named["left"]) == []
    file = read_merges(
        write(
            tmp_path,
            tiny_zoo,
            CHAIN.replace(
                "base_model: left\nmodels: [{model: right,", "base_model: $one\nmodels: [{model: right,"
            ),
        )
    )
    assert "left" not in file.final.model_names
    assert [recipe.name for recipe in file.behind(file.final)] == ["left", "right"]


def test_if_all_have_names_the_one_that_nothing_uses_is_the_final_one(tiny_zoo: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path, tiny_zoo, CHAIN.replace("---\nmerge_method: task", "---\nname: end\nmerge_method: task")
    )
    assert run(file, tmp_path / "out") == ["left", "right", "end"]
    assert run(tmp_path / "out" / "mergekit_config.yml", tmp_path / "again") == ["left", "right", "end"]


def test_a_single_recipe_may_have_a_name(tiny_zoo: Path, tmp_path: Path) -> None:
    assert run(write(tmp_path, tiny_zoo, CHAIN.split("---\n")[0]), tmp_path / "out") == ["left"]
    assert names(tmp_path / "out")[:3] == ["README.md", "config.json", "generation_config.json"]


def test_a_name_wins_over_a_folder(tiny_zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_zoo / "three", tmp_path / "left")
    run(write(tmp_path, tiny_zoo), tmp_path / "with")
    shutil.rmtree(tmp_path / "left")
    run(write(tmp_path, tiny_zoo), tmp_path / "without")
    assert_same(tensors(tmp_path / "with"), tensors(tmp_path / "without"), exact=True)


# What is refused, before anything is merged.

ONE = "models: [{model: $one}]\nmerge_method: passthrough\n"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (f"name: a\n{ONE}---\nname: a\n{ONE}", 5, "name: another recipe has the name 'a'"),
        (f"{ONE}---\n{ONE}", 4, "a second recipe without a name"),
        (f"name: a/b\n{ONE}---\n{ONE}", 1, "name: expected a name without '/'"),
        (f"name: ..\n{ONE}---\n{ONE}", 1, "name: expected a name without '/' that does not start with '.'"),
        (f"name: a+b\n{ONE}---\n{ONE}", 1, "cannot hold '@' or '+'"),
        (f"name: ' a'\n{ONE}---\n{ONE}", 1, "outer spaces"),
        (f"name: a\n{ONE}---\nname: b\n{ONE}", 5, "no other recipe uses a, b"),
        (
            f"name: a\n{ONE.replace('$one', 'b')}---\nname: b\n{ONE.replace('$one', 'a')}---\n{ONE}",
            6,
            "the merges need each other: a -> b -> a",
        ),
        (f"name: a\n{ONE.replace('$one', 'a')}---\n{ONE}", 2, "the merges need each other: a -> a"),
        (
            f"name: left\n{ONE}---\n{ONE.replace('$one', 'left+lora')}",
            5,
            "left is a merge of this file and takes no revision and no adapter, got 'left+lora'",
        ),
        (f"name: left\n{ONE}---\n{ONE.replace('$one', 'left@v1')}", 5, "takes no revision"),
        (f"name: left\n{ONE}---\n{ONE.replace('$one', 'leftt')}", 5, "did you mean 'left'"),
        (f"name: left\n{ONE}---\nmodels: []\nmerge_method: linear\n", 5, "models: "),
        (f"name: left\n{ONE}---\n{ONE.replace('passthrough', 'passthru')}", 6, "did you mean 'passthrough'"),
        (f"name: left\n{ONE}---\n", None, "expected a mapping"),
        ("", None, "expected a recipe, found nothing"),
    ],
)
def test_a_faulty_file_is_refused_with_its_line(
    text: str, line: int | None, reason: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    file = write(tmp_path, tiny_zoo, text)
    with pytest.raises(ConfigurationError) as caught:
        read_merges(file)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"{file}:{line}: " if line else f"{file}")


def test_faults_of_all_documents_are_reported_at_once(tiny_zoo: Path, tmp_path: Path) -> None:
    text = CHAIN.replace("weight: 0.5", "wieght: 0.5").replace("$three", "$tree").replace("0.7", "heavy")
    with pytest.raises(ConfigurationError) as caught:
        read_merges(write(tmp_path, tiny_zoo, text))
    assert {fault.line for fault in caught.value.faults} >= {2, 9, 16}


def test_a_merge_that_would_be_thrown_away_is_refused(tiny_zoo: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_zoo, f"name: stray\n{ONE}---\n{ONE}")
    with pytest.raises(ConfigurationError, match="no other document uses stray; give --intermediate-dir"):
        run(file, tmp_path / "out")
    assert run(file, tmp_path / "out", intermediate_dir=tmp_path / "kept") == ["stray", "final"]


def test_an_occupied_target_is_refused_before_the_first_merge(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    export = Exporter()
    with pytest.raises(RefusedError):
        merge_all(read_merges(write(tmp_path, tiny_zoo)), tmp_path / "out", export)
    assert export.made == []


def test_a_merge_that_fails_leaves_nothing(tiny_zoo: Path, tmp_path: Path) -> None:
    def broken(
        recipe: Recipe, models: Mapping[str, Checkpoint], target: Path, merges: Sequence[Recipe]
    ) -> None:
        if recipe.name != "left":
            raise EvomergeError("broken")
        export_model(recipe, models, target, merges=merges)

    file = write(tmp_path, tiny_zoo)
    with pytest.raises(EvomergeError, match="broken"):
        merge_all(read_merges(file), tmp_path / "out", broken)
    assert names(tmp_path) == ["multi.yml"]


def test_what_a_killed_process_left_is_removed_by_the_next(tiny_zoo: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.merges-4194305"
    left.mkdir()
    (left / "left").mkdir()
    run(write(tmp_path, tiny_zoo), tmp_path / "out")
    assert names(tmp_path) == ["multi.yml", "out"]
    assert not (tmp_path / f".out.merges-{os.getpid()}").exists()


# Merges that are kept.


def test_kept_merges_are_used_again(tiny_zoo: Path, tmp_path: Path) -> None:
    file, kept = write(tmp_path, tiny_zoo), tmp_path / "kept"
    assert run(file, tmp_path / "out", intermediate_dir=kept) == ["left", "right", "final"]
    assert names(kept) == ["left", "left.inputs.json", "right", "right.inputs.json"]
    assert run(file, tmp_path / "again", intermediate_dir=kept) == ["final"]
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "again"), exact=True)


def test_another_recipe_of_a_kept_merge_is_noticed(tiny_zoo: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run(write(tmp_path, tiny_zoo), tmp_path / "out", intermediate_dir=kept)
    file = write(tmp_path, tiny_zoo, CHAIN.replace("0.7", "0.6"))
    with pytest.raises(RefusedError, match=f"{kept}/left: made from another recipe"):
        run(file, tmp_path / "again", intermediate_dir=kept)
    shutil.rmtree(kept / "left")
    with pytest.raises(RefusedError, match=f"{kept}/right: made from another recipe"):
        run(file, tmp_path / "again", intermediate_dir=kept)
    shutil.rmtree(kept / "right")
    assert run(file, tmp_path / "again", intermediate_dir=kept) == ["right", "final"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json", "generation_config.json"])
def test_another_source_of_a_kept_merge_is_noticed(file: str, tiny_zoo: Path, tmp_path: Path) -> None:
    zoo, kept = tmp_path / "zoo", tmp_path / "kept"
    for name in ("one", "two", "three"):
        variant(tiny_zoo / name, zoo / name)
    run(write(tmp_path, zoo), tmp_path / "out", intermediate_dir=kept)
    if file == "model.safetensors":
        shutil.copy(tiny_zoo / "base" / file, zoo / "one" / file)
    else:
        content = json.loads((zoo / "one" / file).read_text())
        (zoo / "one" / file).write_text(json.dumps({**content, "changed": True}))
    with pytest.raises(RefusedError, match="kept/left: made from another recipe, other models"):
        run(write(tmp_path, zoo), tmp_path / "again", intermediate_dir=kept)


def test_a_damaged_kept_merge_is_noticed(tiny_zoo: Path, tmp_path: Path) -> None:
    file, kept = write(tmp_path, tiny_zoo), tmp_path / "kept"
    run(file, tmp_path / "out", intermediate_dir=kept)
    weights = kept / "left" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RefusedError, match=r"cannot be used again: .*its content differs from the manifest"):
        run(file, tmp_path / "again", intermediate_dir=kept)


def test_a_folder_of_another_origin_is_not_taken_for_a_kept_merge(tiny_zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_zoo / "one", tmp_path / "kept" / "left")
    with pytest.raises(RefusedError, match=r"cannot be used again: .*manifest\.json is missing"):
        run(write(tmp_path, tiny_zoo), tmp_path / "out", intermediate_dir=tmp_path / "kept")
    assert not (tmp_path / "out").exists()
