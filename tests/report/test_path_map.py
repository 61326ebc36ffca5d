"""The path of a trial: from the journal, and in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigurationError
from evomerge.journal import Journal
from evomerge.records import Genome
from evomerge.report.path_map import MERGED, PathMap, path_of_run, path_of_trial, write_path_map
from evomerge.report.trials import open_stages
from evomerge.run_dir import RunDir
from evomerge.spaces.path import Hop, Semantics
from evomerge.stages import Stage
from tests.report.runs import PARAMETER, SCALED, STAGES, genome, make_run, trial


class Straight:
    """A space whose genomes are the numbers of layers of `a`, then a scale for the layer 0 of `b`."""

    semantics: Semantics = "stream"

    def hops(self, genome: Genome) -> tuple[Hop, ...]:
        *layers, scale = genome
        return (
            *(Hop(model="a", layer=int(layer)) for layer in layers),
            Hop(model="b", layer=0, scale=scale),
        )


def stage(space: object, **depths: int) -> Stage:
    return Stage(name="search", space=space, new_searcher=list, evaluations=9, depths=depths)  # type: ignore[arg-type]


def path(*hops: tuple[str, int, float], **depths: int) -> PathMap:
    places = tuple(Hop(model=model, layer=layer, scale=scale) for model, layer, scale in hops)
    return PathMap(title="", hops=places, depths=depths, scale_means="")


def test_consecutive_layers_of_one_model_and_scale_are_one_piece() -> None:
    found = path(
        *(("a", layer, 1.0) for layer in (0, 1, 2, 2, 1)),
        *(("b", layer, 0.8) for layer in (2, 3)),
        ("b", 4, 0.5),
        ("a", 5, -1.5),
        a=8,
        b=8,
    )
    assert found.pieces == ("A 0-2", "A 2", "A 1", "B 2-3 x0.8", "B 4 x0.5", "A 5 x-1.5")


def test_scales_that_are_written_alike_are_joined() -> None:
    assert path(("a", 0, 1.0), ("a", 1, 1.0001), a=2).pieces == ("A 0-1",)


def test_letters_go_on_after_the_alphabet() -> None:
    depths = {f"m{number}": 1 for number in range(28)}
    letters = path(("m0", 0, 1.0), **depths).letters
    assert (letters["m0"], letters["m25"], letters["m26"], letters["m27"]) == ("A", "Z", "A1", "B1")


def test_the_summary_counts_layers_once_and_repetitions_apart() -> None:
    found = path(("a", 0, 1.0), ("a", 1, 1.0), ("a", 0, 1.0), ("a", 0, 1.0), a=4, b=4)
    assert found.summary == "4 hops over 2 of 8 layers, 1 of them more than once"
    assert path(("a", 0, 1.0), a=1).summary == "1 hops over 1 of 1 layers"


def test_the_spread_is_the_largest_distance_from_1() -> None:
    assert path(("a", 0, 1.25), ("a", 1, -0.5), a=2).spread == 1.5


def test_a_path_is_what_the_space_says_with_the_meaning_of_its_scales() -> None:
    found = path_of_trial(stage(Straight(), a=4, b=2), trial(0, (0, 2, 0.5)), base=None, title="x")
    assert found.pieces == ("A 0", "A 2", "B 0 x0.5")
    assert found.scale_means == "factor on the hidden state that enters the hop"


def test_the_base_is_left_out_unless_it_is_a_source_or_on_the_path() -> None:
    def models(base: str | None, **depths: int) -> list[str]:
        found = path_of_trial(stage(Straight(), **depths), trial(0, (0, 0.5)), base=base, title="")
        return list(found.depths)

    assert models("c", a=4, b=2, c=4) == ["a", "b"]
    assert models("b", a=4, b=2) == ["a", "b"]
    assert models("c", c=4, a=4, b=2) == ["c", "a", "b"]
    assert models(None, a=4, b=2, c=4) == ["a", "b", "c"]


def test_the_best_trial_of_a_data_flow_run_is_shown_by_default(tmp_path: Path, tiny_zoo: Path) -> None:
    trials = [
        trial(0, genome("one.1", "one.2"), fitness=0.5),
        trial(1, genome("two.1", "two.2"), fitness=0.75),
        trial(2, genome(), fitness=None),
    ]
    run = make_run(tmp_path, tiny_zoo, trials)
    found = path_of_run(run, None)
    assert found.pieces == ("A 0", "B 1-2", "A 3")
    assert found.depths == {str(tiny_zoo / "one"): 4, str(tiny_zoo / "two"): 4}
    assert found.title == f"trial 1 of {run}, fitness 0.7500 (standard error 0.0500) on the search documents"
    assert path_of_run(run, 2).pieces == ("A 0", "A 3")
    assert path_of_run(run, 2).title == f"trial 2 of {run}"
    with pytest.raises(ConfigurationError, match="no trial 7 is recorded; 3 trials are"):
        path_of_run(run, 7)


def test_the_scales_of_a_run_are_those_of_its_hops(tmp_path: Path, tiny_zoo: Path) -> None:
    space = open_stages(
        Journal.load(RunDir(make_run(tmp_path / "dry", tiny_zoo, [], search_space=SCALED)).journal)
    )[0].space
    genes = [1.5 if item.name == "scale[two.1]" else item.start for item in space.dimensions]
    genes[: len(genome())] = genome("two.1")
    run = make_run(tmp_path / "run", tiny_zoo, [trial(0, genes)], search_space=SCALED)
    assert path_of_run(run, 0).pieces == ("A 0", "B 1 x1.5", "A 3")


def test_of_stages_the_best_trial_with_a_path_is_shown(tmp_path: Path, tiny_zoo: Path) -> None:
    slots = 6 + 4  # the layers of `one` are those of a third model now
    trials = [trial(0, (0.5, 0.5), fitness=0.9), trial(1, (-0.5,) * slots, fitness=0.4)]
    run = make_run(tmp_path, tiny_zoo, trials, stages=STAGES)
    found = path_of_run(run, None)
    assert found.title.startswith("trial 1 of ")
    assert found.pieces == ("A 0", "A 3")
    assert next(iter(found.depths)) == "weights"
    with pytest.raises(ConfigurationError, match=r"trial 0 has no path, .* those of the stage order have"):
        path_of_run(run, 0)


def test_a_run_over_weights_has_no_path(tmp_path: Path, tiny_zoo: Path) -> None:
    run = make_run(tmp_path, tiny_zoo, [trial(0, (0.5, 0.5))], search_space=PARAMETER)
    with pytest.raises(ConfigurationError, match="this run has no paths: it merges weights"):
        path_of_run(run, None)


def test_hops_of_a_joint_space_go_through_the_merge_of_all(tmp_path: Path, tiny_zoo: Path) -> None:
    space = {
        "type": "joint",
        "merge_method": "linear",
        "parameters": {"weight": {"low": 0.0, "high": 1.0}},
        "indicators": {"repeats": 1},
    }
    run = make_run(tmp_path, tiny_zoo, [trial(0, (0.5, 0.5, -0.5, 0.5))], search_space=space)
    found = path_of_run(run, 0)
    assert found.depths == {MERGED: 4}
    assert found.pieces == ("A 0", "A 2-3")


def test_a_picture_is_written_where_there_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "path.png"
    assert not write_path_map(file, stage(object(), a=4), trial(0, (0, 1.0)), base=None)
    assert not file.exists()
    assert write_path_map(file, stage(Straight(), a=4, b=2), trial(0, (0, 1.0)), base=None)
    assert file.read_bytes().startswith(b"\x89PNG")
