import math
import random
from collections import Counter
from statistics import mean, pstdev

import numpy
import pytest

from evomerge.records import Dimension, Kind
from evomerge.search.cat_cma import START_SHARE, CatCma, CatCmaOptions
from evomerge.search.cma_es import CmaEs, CmaEsOptions
from evomerge.search.random_search import RandomOptions, RandomSearch


def unit(num_dimensions, start=0.5):
    return [Dimension(name=f"t{i}", low=0.0, high=1.0, start=start) for i in range(num_dimensions)]


def integers(num_dimensions, low, high, start):
    return [
        Dimension(name=f"i{i}", low=low, high=high, start=start, kind=Kind.INTEGER)
        for i in range(num_dimensions)
    ]


def choices(num_dimensions, num_choices, start=0.0):
    return [
        Dimension(
            name=f"c{i}",
            low=0.0,
            high=num_choices - 1.0,
            start=start,
            kind=Kind.CATEGORICAL,
            choices=tuple("abcdefgh"[:num_choices]),
        )
        for i in range(num_dimensions)
    ]


def proposals(searcher, num_generations, loss):
    """All genomes proposed while the loss is minimised."""
    seen = []
    for _ in range(num_generations):
        genomes = searcher.ask()
        searcher.tell([-loss(genome) for genome in genomes])
        seen += genomes
    return seen


def best_of(searcher, num_generations, loss):
    """The genome with the smallest loss that the searcher proposes."""
    return min(proposals(searcher, num_generations, loss), key=loss)


@pytest.mark.parametrize("seed", range(3))
def test_weights_with_choices_are_tuned_together(seed):
    weights = [0.1 + 0.05 * i for i in range(16)]
    wanted = [float((3 * i + seed) % 4) for i in range(12)]

    def loss(genome):
        wrong = sum(value != choice for value, choice in zip(genome[16:], wanted, strict=True))
        return wrong / 4 + math.dist(genome[:16], weights) ** 2

    dimensions = [*unit(16), *choices(12, 4)]
    found = loss(best_of(CatCma(dimensions, seed, CatCmaOptions(population=15)), 100, loss))
    by_rotation = loss(best_of(CmaEs(dimensions, seed, CmaEsOptions(population=15)), 100, loss))
    by_chance = loss(best_of(RandomSearch(dimensions, seed, RandomOptions(population=15)), 100, loss))
    assert found < 1e-3
    assert found < by_rotation / 10
    assert by_rotation < by_chance / 3


@pytest.mark.parametrize("seed", range(3))
def test_choices_that_only_pay_together_are_found(seed):
    # The choice decides which weight is right, so neither can be settled first.
    def loss(genome):
        return abs(genome[0] - (0.2, 0.8, 0.5)[int(genome[1])]) + 0.3 * (genome[1] != 1)

    found = best_of(CatCma([*unit(1), *choices(1, 3)], seed, CatCmaOptions()), 60, loss)
    assert found == (pytest.approx(0.8, abs=1e-3), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_an_ill_conditioned_ellipsoid_is_solved(seed):
    optimum = (0.15, 0.8, 0.3, 0.7, 0.25, 0.9, 0.6, 0.4)

    def ellipsoid(genome):
        return sum(
            10 ** (3 * i / 7) * (value - target) ** 2
            for i, (value, target) in enumerate(zip(genome, optimum, strict=True))
        )

    searcher = CatCma(unit(8), seed, CatCmaOptions())
    assert searcher.population == 10
    assert ellipsoid(best_of(searcher, 250, ellipsoid)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_an_optimum_on_the_bounds_is_found(seed):
    optimum = (0.0, 0.0, 1.0, 1.0, 0.3, 0.6)

    def distance(genome):
        return math.dist(genome, optimum)

    searcher = CatCma(unit(6), seed, CatCmaOptions())
    assert best_of(searcher, 150, distance) == pytest.approx(optimum, abs=1e-5)
    late = proposals(searcher, 20, distance)
    assert mean(value in (0.0, 1.0) for genome in late for value in genome[:4]) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_search_leaves_the_bound_again_when_that_pays(seed):
    searcher = CatCma(unit(4), seed, CatCmaOptions())
    at_bound = best_of(searcher, 60, sum)
    inside = best_of(searcher, 200, lambda genome: math.dist(genome, (0.4, 0.5, 0.6, 0.7)))
    assert at_bound == (0.0, 0.0, 0.0, 0.0)
    assert inside == pytest.approx((0.4, 0.5, 0.6, 0.7), abs=1e-3)


def test_a_log_dimension_is_searched_by_ratios():
    dimensions = [
        Dimension(name="low", low=1e-6, high=1.0, start=1.0, log=True),
        Dimension(name="high", low=1.0, high=1e6, start=1.0, log=True),
    ]

    def distance(genome):
        return math.hypot(math.log(genome[0] / 3e-5), math.log(genome[1] / 2e3))

    found = best_of(CatCma(dimensions, 1, CatCmaOptions()), 100, distance)
    assert found == pytest.approx((3e-5, 2e3), rel=1e-4)


@pytest.mark.parametrize(
    "dimension",
    [
        *unit(1),
        *integers(1, 0.0, 1.0, 0.0),
        *integers(1, 0.0, 100.0, 50.0),
        *integers(1, -1e6, 1e6, 7.0),
    ],
    ids=lambda d: f"{d.kind} to {d.high:g}",
)
def test_one_number_beside_constants_is_searched(dimension):
    constant = Dimension(name="fixed", low=2.0, high=2.0, start=2.0)
    target = 0.37 if dimension.kind is Kind.CONTINUOUS else dimension.high
    searcher = CatCma([constant, dimension, constant], 1, CatCmaOptions())
    found = best_of(searcher, 60, lambda genome: abs(genome[1] - target))
    assert found == (2.0, pytest.approx(target, abs=1e-5), 2.0)


def test_integers_are_searched_by_their_number_of_values():
    dimensions = [*integers(2, 0.0, 1.0, 0.0), *integers(3, 0.0, 999.0, 0.0), *integers(4, 0.0, 1000.0, 0.0)]
    strategy = CatCma(dimensions, 1, CatCmaOptions())._strategy
    assert (strategy.n_categorical, strategy.n_integer, strategy.n_continuous) == (2, 3, 4)


def test_the_first_generation_surrounds_the_start():
    dimensions = [
        *[Dimension(name=f"t{i}", low=-2.0, high=2.0, start=1.0) for i in range(5)],
        *integers(5, 0.0, 99.0, 80.0),
        *choices(5, 4, start=2.0),
        *integers(5, 6.0, 7.0, 7.0),
    ]
    genomes = CatCma(dimensions, 1, CatCmaOptions(sigma=0.01, population=400)).ask()
    numbers, whole, chosen, flags = (
        [value for genome in genomes for value in genome[first : first + 5]] for first in (0, 5, 10, 15)
    )
    assert mean(numbers) == pytest.approx(1.0, abs=0.005)
    assert pstdev(numbers) == pytest.approx(0.04, rel=0.1)
    assert mean(whole) == pytest.approx(80.0, abs=0.1)
    assert pstdev(whole) == pytest.approx(1.0, rel=0.1)
    for values, start, num_choices in ((chosen, 2.0, 4), (flags, 7.0, 2)):
        shares = {value: count / len(values) for value, count in Counter(values).items()}
        expected = (1 - START_SHARE) / num_choices
        # Four standard errors of 2000 draws.
        assert shares.pop(start) == pytest.approx(START_SHARE + expected, abs=0.045)
        assert list(shares.values()) == pytest.approx([expected] * (num_choices - 1), abs=0.045)


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_and_other_choices_stay_in_reach_after_convergence(seed):
    searcher = CatCma([*unit(4), *integers(2, 0.0, 9.0, 5.0), *choices(2, 3)], seed, CatCmaOptions())

    def loss(genome):
        return math.dist(genome, (0.3, 0.4, 0.5, 0.6, 3.0, 7.0, 1.0, 2.0))

    proposals(searcher, 150, loss)
    late = proposals(searcher, 30, loss)
    assert max(pstdev(genome[i] for genome in late) for i in range(4)) < 1e-3
    for position in range(4, 8):
        usual, *others = Counter(genome[position] for genome in late).most_common()
        assert usual[1] > 0.75 * len(late)
        assert others


@pytest.mark.parametrize("seed", range(3))
def test_a_search_converges_within_the_valid_half_although_better_lies_beyond(seed):
    searcher = CatCma(unit(4, start=0.6), seed, CatCmaOptions())
    for _ in range(100):
        genomes = searcher.ask()
        searcher.tell([None if genome[0] < 0.5 else -sum(genome) for genome in genomes])
    assert mean(genome[0] for genome in searcher.ask()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("population", [4, 8])
def test_a_plateau_neither_narrows_nor_widens_the_search(population):
    dimensions = [*unit(2), *integers(2, 0.0, 99.0, 50.0), *choices(2, 4, start=1.0)]
    searcher = CatCma(dimensions, 1, CatCmaOptions(population=population, sigma=0.05))
    seen = proposals(searcher, 400, lambda genome: 0.25)
    early, late = (
        list(zip(*part, strict=True)) for part in (seen[: len(seen) // 4], seen[-len(seen) // 4 :])
    )
    for position in range(4):
        assert pstdev(late[position]) == pytest.approx(pstdev(early[position]), rel=0.15)
    for position in (4, 5):
        share_early, share_late = (mean(value == 1.0 for value in part[position]) for part in (early, late))
        assert share_late == pytest.approx(share_early, abs=0.1)


@pytest.mark.parametrize("population", [4, 5, 6])
def test_a_fitness_in_steps_is_searched_from_plateau_to_plateau(population):
    def correct_of_20(genome):
        return math.floor(20 - 20 * math.dist(genome[:2], (0.9, 0.1)) - 3 * (genome[2] != 1)) / 20

    searcher = CatCma([*unit(2, start=0.3), *choices(1, 3)], 0, CatCmaOptions(population=population))
    assert correct_of_20(best_of(searcher, 120, lambda genome: -correct_of_20(genome))) >= 0.95


def test_steps_never_grow_beyond_a_third_of_the_range():
    # Once all integers are at their bound, chance decides among equals, and steps would grow without end.
    dimensions = integers(3, 0.0, 4.0, 0.0)
    searcher = CatCma(dimensions, 1, CatCmaOptions(population=32))
    for _ in range(150):
        genomes = searcher.ask()
        searcher.tell([sum(genome) for genome in genomes])
        strategy = searcher._strategy
        deviations = [
            strategy._sigma * strategy._A[i] * math.sqrt(strategy._C[i, i]) for i in range(len(dimensions))
        ]
        assert max(deviations) <= 1 / 3 + 1e-12


def test_the_covariance_keeps_its_size_without_changing_what_is_proposed(monkeypatch):
    dimensions = [*unit(3), *integers(1, 0.0, 20.0, 9.0), *choices(2, 3)]
    chance = random.Random(1)
    searcher = CatCma(dimensions, 3, CatCmaOptions())
    seen = []
    for _ in range(60):
        seen += searcher.ask()
        searcher.tell([chance.random() for _ in range(searcher.population)])
        variances = numpy.linalg.eigvalsh(searcher._strategy._C)
        assert variances.max() == pytest.approx(1, abs=1e-12)
        assert variances.min() > 1e-15

    monkeypatch.setattr(CatCma, "_restrain", lambda self: None)
    chance = random.Random(1)
    drifting = CatCma(dimensions, 3, CatCmaOptions())
    for first in range(0, 20 * drifting.population, drifting.population):
        for genome, other in zip(drifting.ask(), seen[first:], strict=False):
            assert genome == pytest.approx(other, abs=1e-9)
        drifting.tell([chance.random() for _ in range(drifting.population)])
    assert abs(numpy.linalg.eigvalsh(drifting._strategy._C).max() - 1) > 0.05


def test_the_accuracy_of_probabilities_stays_where_their_cumulation_is_an_average():
    # Chance alone agrees with itself for a while now and then; unchecked, this search ends in numbers that are
    # not finite.
    searcher = CatCma(choices(2, 2), 0, CatCmaOptions(population=6))
    chance = random.Random(1)
    for _ in range(300):
        genomes = searcher.ask()
        searcher.tell([chance.random() for _ in genomes])
        assert 1 / (searcher._strategy._Delta * math.sqrt(2)) <= 1 + 1e-12


def test_only_the_order_of_fitness_counts():
    dimensions = [*unit(3), *integers(2, 0.0, 9.0, 5.0), *choices(2, 3)]
    plain, stretched = (CatCma(dimensions, 1, CatCmaOptions()) for _ in range(2))
    for _ in range(40):
        genomes = plain.ask()
        assert stretched.ask() == genomes
        plain.tell([-sum(genome) for genome in genomes])
        stretched.tell([1e6 * math.exp(-sum(genome)) for genome in genomes])


@pytest.mark.parametrize(
    "dimensions",
    [unit(1), unit(3), integers(1, 0.0, 9.0, 2.0), choices(1, 2), choices(3, 4), [*unit(1), *choices(2, 3)]],
    ids=["number", "numbers", "integer", "flag", "choices", "number and choices"],
)
def test_a_search_far_beyond_convergence_keeps_proposing(dimensions):
    # Warnings are errors: neither the steps nor the learning rates may leave the range of floats.
    searcher = CatCma(dimensions, 0, CatCmaOptions(population=5))
    target = [1.0 if d.kind is not Kind.CONTINUOUS else 0.3 for d in dimensions]
    best = best_of(searcher, 1200, lambda genome: math.dist(genome, target))
    assert best == pytest.approx(target, abs=1e-8)


def test_hundreds_of_dimensions_are_searched():
    searcher = CatCma([*unit(150), *choices(50, 2)], 1, CatCmaOptions(population=40))
    for generation in range(4):
        genomes = searcher.ask()
        searcher.tell([0.0 if generation % 2 else -sum(genome) for genome in genomes])
    assert len(set(searcher.ask())) == 40
