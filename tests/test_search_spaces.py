"""Every shipped search space says what it is for, and works."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.anatomy import anatomy_of
from evomerge.merge.check import check_recipe
from evomerge.merge.execute import is_finite, merge_tensor
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import plan_merge
from evomerge.spaces import SourceModels, build_space, read_space
from evomerge.spaces.data_flow import DataFlowSpace
from evomerge.spaces.joint import JointSpace
from evomerge.spaces.limits import size_of
from evomerge.spaces.path import Hop
from evomerge.yaml_file import parse_yaml, read_single

FOLDER = Path(__file__).parents[1] / "search_spaces"
PAGE = FOLDER.parent / "docs" / "search_spaces.md"
FILES = sorted(FOLDER.glob("*.y*ml"))
PathSpace = DataFlowSpace | JointSpace


def models(folder: Path, *names: str, base: str | None = None) -> tuple[SourceModels, dict[str, Checkpoint]]:
    """What spaces know of models of 4 layers, and the models."""
    paths = [f"{folder}/{name}" for name in (*names, *([base] if base else []))]
    opened = {path: Checkpoint.open(Path(path)) for path in paths}
    sources = SourceModels(
        models=tuple(paths[: len(names)]),
        base=paths[-1] if base else None,
        num_layers=4,
        dtype="bfloat16",
        depths=dict.fromkeys(paths, 4),
        anatomies={path: anatomy_of(opened[path]) for path in paths[: len(names)]},
        sizes={path: size_of(opened[path]) for path in paths[: len(names)]},
    )
    return sources, opened


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
    method = METHODS.get(document.data.get("merge_method"))
    count = 3 if method is None or method.max_models is None else method.max_models - 1
    sources, checkpoints = models(tiny_zoo, *("one", "two", "three")[:count], base="base")
    space = build_space(document, sources)
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
        assert plan.num_layers == (len(space.hops(genome)) if isinstance(space, PathSpace) else 4)
        assert all(is_finite(merge_tensor(tensor, checkpoints)) for tensor in plan.tensors)


@pytest.mark.parametrize(
    "name", ["data_flow_indicator", "data_flow_path", "data_flow_blocks", "joint_linear"]
)
def test_a_search_for_a_path_starts_at_all_layers_in_their_order(name: str, tiny_zoo: Path) -> None:
    sources, _ = models(tiny_zoo, "one", "two")
    space = build_space(read_single(FOLDER / f"{name}.yml"), sources)
    assert isinstance(space, PathSpace)
    hops = space.hops(tuple(item.start for item in space.dimensions))
    assert hops == tuple(Hop(model=f"{tiny_zoo}/one", layer=layer) for layer in range(4))


def test_the_papers_data_flow_has_three_repetitions_and_starts_two_sigma_from_leaving_the_first_model(
    tiny_zoo: Path,
) -> None:
    sources, _ = models(tiny_zoo, "one", "two")
    space = build_space(read_single(FOLDER / "data_flow_indicator.yml"), sources)
    indicators = [item for item in space.dimensions if item.name.startswith("use")]
    assert len(indicators) == 3 * 8 - 2
    sigma = 0.05 * (indicators[0].high - indicators[0].low)
    assert [item.start for item in indicators] == [2 * sigma, 2 * sigma, *[0.0] * 20]


def test_the_papers_space_is_weight_and_density_per_source_from_one_half(tiny_zoo: Path) -> None:
    sources, _ = models(tiny_zoo, "one", "two", "three", base="base")
    space = build_space(read_single(FOLDER / "dare_ties.yml"), sources)
    assert [item.name for item in space.dimensions] == [
        f"{parameter}[{name}]" for parameter in ("weight", "density") for name in ("one", "two", "three")
    ]
    assert {item.start for item in space.dimensions} == {0.5}
    assert {item.high for item in space.dimensions} == {1.0}


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(type: .*?)```", PAGE.read_text(), re.DOTALL))
def test_every_example_of_the_documentation_can_be_read(text: str) -> None:
    (document,) = parse_yaml(text, file=PAGE.name)
    read_space(document)
