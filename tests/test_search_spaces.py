"""Every shipped search space says what it is for, and works."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.check import check_recipe
from evomerge.merge.execute import is_finite, merge_tensor
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import plan_merge
from evomerge.spaces import SourceModels, build_space
from evomerge.yaml_file import read_single

FOLDER = Path(__file__).parents[1] / "search_spaces"
FILES = sorted(FOLDER.glob("*.y*ml"))


def test_there_are_search_spaces() -> None:
    assert "dare_ties.yml" in [file.name for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_search_space_opens_with_its_intent_and_command(file: Path) -> None:
    text = file.read_text()
    head = text.split("\ntype:")[0].splitlines()
    assert len(head) >= 4
    assert all(line.startswith("#") for line in head)
    assert head[0].startswith("# ")
    assert head[-1] == f"#   evomerge run EXPERIMENT        with  search_space: search_spaces/{file.name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_of_a_search_space_merges(file: Path, tiny_zoo: Path) -> None:
    document = read_single(file)
    method = METHODS[document.data["merge_method"]]
    count = 3 if method.max_models is None else method.max_models - 1
    names = [f"{tiny_zoo}/{name}" for name in ("one", "two", "three")[:count]]
    base = f"{tiny_zoo}/base"
    checkpoints = {name: Checkpoint.open(Path(name)) for name in [*names, base]}
    space = build_space(
        document, SourceModels(models=tuple(names), base=base, num_layers=4, dtype="bfloat16")
    )
    draw = random.Random(0)
    corners = [
        tuple(item.start for item in space.dimensions),
        tuple(item.low for item in space.dimensions),
        tuple(item.high for item in space.dimensions),
        tuple(draw.choice([item.low, item.high]) for item in space.dimensions),
    ]
    for genome in corners:
        recipe = space.decode(genome)
        assert check_recipe(recipe) == []
        plan = plan_merge(recipe, checkpoints)
        assert plan.num_layers == 4
        assert all(is_finite(merge_tensor(tensor, checkpoints)) for tensor in plan.tensors)


def test_the_papers_space_is_weight_and_density_per_source_from_one_half(tiny_zoo: Path) -> None:
    models = tuple(f"{tiny_zoo}/{name}" for name in ("one", "two", "three"))
    sources = SourceModels(models=models, base=f"{tiny_zoo}/base", num_layers=4, dtype="bfloat16")
    space = build_space(read_single(FOLDER / "dare_ties.yml"), sources)
    assert [item.name for item in space.dimensions] == [
        f"{parameter}[{name}]" for parameter in ("weight", "density") for name in ("one", "two", "three")
    ]
    assert {item.start for item in space.dimensions} == {0.5}
    assert {item.high for item in space.dimensions} == {1.0}
