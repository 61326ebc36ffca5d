import math
from collections import Counter
from statistics import mean, pstdev

import pytest

from evomerge.records import Dimension, Kind
from evomerge.search.random_search import RandomOptions, RandomSearch


def test_draws_are_uniform_on_the_scale_of_their_dimension():
    dimensions = [
        Dimension(name="linear", low=-1.0, high=3.0, start=3.0),
        Dimension(name="log", low=1e-4, high=1.0, start=1.0, log=True),
    ]
    genomes = RandomSearch(dimensions, 1, RandomOptions(population=4000)).ask()
    for coordinates in (
        [(linear + 1) / 4 for linear, _ in genomes],
        [1 + math.log10(log) / 4 for _, log in genomes],
    ):
        # Mean and spread of a uniform draw; the tolerance is four standard errors.
        assert mean(coordinates) == pytest.approx(0.5, abs=0.02)
        assert pstdev(coordinates) == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_whole_numbers_and_choices_are_all_equally_likely():
    dimensions = [
        Dimension(name="layer", low=-3.0, high=4.0, start=0.0, kind=Kind.INTEGER),
        Dimension(name="method", low=0.0, high=4.0, start=2.0, kind=Kind.CATEGORICAL, choices=tuple("abcde")),
    ]
    genomes = RandomSearch(dimensions, 1, RandomOptions(population=8000)).ask()
    for values, expected in zip(zip(*genomes, strict=True), (range(-3, 5), range(5)), strict=True):
        counts = Counter(values)
        assert sorted(counts) == list(expected)
        # Four standard errors of a share of 1/8 are 12 percent of it, of 1/5 less.
        assert list(counts.values()) == pytest.approx(
            [len(genomes) / len(expected)] * len(expected), rel=0.12
        )


def test_the_first_genome_is_random_too():
    dimensions = [Dimension(name="t", low=0.0, high=1.0, start=0.5)]
    firsts = {RandomSearch(dimensions, seed, RandomOptions()).ask()[0] for seed in range(5)}
    assert len(firsts) == 5
    assert (0.5,) not in firsts


def test_fitness_changes_nothing():
    dimensions = [Dimension(name="t", low=0.0, high=1.0, start=0.5)]
    one, other = (RandomSearch(dimensions, 1, RandomOptions()) for _ in range(2))
    one.tell([genome[0] for genome in one.ask()])
    other.tell([-genome[0] for genome in other.ask()])
    assert one.ask() == other.ask()
