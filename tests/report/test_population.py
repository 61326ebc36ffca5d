"""Which layers the candidates of a search keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ConfigurationError
from evomerge.report.population import Population, population_of_run, population_text
from tests.report.runs import DATA_FLOW, PARAMETER, STAGES, genome, make_run, trial


def population(sizes: tuple[int, ...], **counts: list[list[int]]) -> Population:
    arrays = {model: np.array(rows) for model, rows in counts.items()}
    depths = {model: array.shape[1] for model, array in arrays.items()}
    return Population(title="a title", sizes=sizes, depths=depths, counts=arrays)


def test_shares_count_candidates_and_repeats_their_passes() -> None:
    found = population((2, 3), a=[[1, 0], [3, 0], [0, 2], [0, 0], [1, 1]])
    np.testing.assert_allclose(found.shares["a"], [[1.0, 1 / 3], [0.0, 2 / 3]])
    np.testing.assert_allclose(found.repeats["a"], [[2.0, 1.0], [0.0, 1.5]])


def test_candidates_that_were_asked_for_together_are_a_generation(tmp_path: Path, tiny_zoo: Path) -> None:
    trials = [
        trial(1, genome("one.1"), fitness=None),  # trials stand in the order of their arrival
        trial(0, genome("one.1", "two.3")),
        trial(3, genome(), asked_after=2),
        trial(2, genome("two.3"), asked_after=2),
        trial(4, genome("two.3"), asked_after=4),
    ]
    found = population_of_run(make_run(tmp_path, tiny_zoo, trials))
    one, two = (str(tiny_zoo / name) for name in ("one", "two"))
    assert found.sizes == (2, 2, 1)
    assert found.shares[one].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert found.shares[two].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0.5, 0.5, 1]]
    assert found.repeats[two].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_repetitions_within_a_path_are_counted(tmp_path: Path, tiny_zoo: Path) -> None:
    space = {**DATA_FLOW, "genome": {"type": "indicator", "repeats": 2}}
    every = (0.5,) * (2 * 8 - 2)
    found = population_of_run(make_run(tmp_path, tiny_zoo, [trial(0, every)], search_space=space))
    assert found.counts[str(tiny_zoo / "two")].tolist() == [[2, 2, 2, 2]]


def test_of_stages_the_one_over_paths_is_shown(tmp_path: Path, tiny_zoo: Path) -> None:
    trials = [trial(0, (0.5, 0.5)), trial(1, (0.5,) * 10, asked_after=1)]
    found = population_of_run(make_run(tmp_path, tiny_zoo, trials, stages=STAGES))
    assert found.sizes == (1,)
    assert found.counts["weights"].tolist() == [[1, 1, 1, 1]]


def test_a_run_without_paths_is_refused(tmp_path: Path, tiny_zoo: Path) -> None:
    weights = make_run(tmp_path / "weights", tiny_zoo, [trial(0, (0.5, 0.5))], search_space=PARAMETER)
    with pytest.raises(ConfigurationError, match="this run has no paths"):
        population_of_run(weights)
    with pytest.raises(ConfigurationError, match="no trial with a path is recorded yet"):
        population_of_run(make_run(tmp_path / "empty", tiny_zoo, []))
    mixed = make_run(tmp_path / "mixed", tiny_zoo, [trial(0, (0.5, 0.5))], stages=STAGES)
    with pytest.raises(ConfigurationError, match="no trial with a path is recorded yet"):
        population_of_run(mixed)


MAP = """\
a title
share of the candidates that keep a layer, by generation

B b
     1  +
     0 #
A a
     1 -.
     0 ##
  gen. 0

. below 25 %   - 25 to 50 %   + 50 to 75 %   # 75 % and more"""


def test_shares_are_shades() -> None:
    found = population(
        (4, 5),
        a=[[1, 1], [1, 0], [1, 0], [1, 0], [1, 1], [1, 0], [1, 0], [1, 0], [1, 0]],
        b=[[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 0], [0, 0]],
    )
    lines = [line.plain.rstrip() for line in population_text(found, width=80, plain=True)]
    assert "\n".join(lines) == MAP
    shaded = "\n".join(line.plain for line in population_text(found, width=80, plain=False))
    assert "1 ▒░" in shaded
    assert "0 ██" in shaded


def test_a_second_map_counts_repetitions() -> None:
    found = population((1, 1), a=[[3, 1, 0], [2, 1, 12]])
    lines = [line.plain.rstrip() for line in population_text(found, width=80, plain=True)]
    start = lines.index("passes of a layer by paths that keep it, where more than one in the mean")
    assert lines[start + 2 :] == ["A a", "     2  9", "     1", "     0 32", "  gen. 0"]


def test_many_generations_stay_within_the_width() -> None:
    found = population((1,) * 200, a=[[1, 2]] * 200)
    assert max(len(line.plain) for line in population_text(found, width=60, plain=True)) <= 60
