import math
from statistics import mean, pstdev

import pytest

from evomerge.records import Dimension, Kind
from evomerge.search.cma_es import CmaEs, CmaEsOptions
from evomerge.search.random_search import RandomOptions, RandomSearch

BOUNDS = ["transform", "penalty"]


def unit(num_dimensions, start=0.5):
    return [Dimension(name=f"t{i}", low=0.0, high=1.0, start=start) for i in range(num_dimensions)]


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


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("seed", range(3))
def test_an_ill_conditioned_ellipsoid_is_solved_where_random_search_is_lost(seed, bounds):
    optimum = (0.15, 0.8, 0.3, 0.7, 0.25, 0.9, 0.6, 0.4)
    dimensions = [Dimension(name=f"t{i}", low=-1.0, high=3.0, start=1.0) for i in range(8)]

    def ellipsoid(genome):
        return sum(
            10 ** (3 * i / 7) * (value - target) ** 2
            for i, (value, target) in enumerate(zip(genome, optimum, strict=True))
        )

    searcher = CmaEs(dimensions, seed, CmaEsOptions(bounds=bounds))
    assert searcher.population == 10
    found = ellipsoid(best_of(searcher, 200, ellipsoid))
    by_chance = ellipsoid(best_of(RandomSearch(dimensions, seed, RandomOptions()), 200, ellipsoid))
    assert found < 1e-6
    assert by_chance > 1e6 * found


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("seed", range(3))
def test_an_optimum_on_the_bounds_is_found(seed, bounds):
    optimum = (0.0, 0.0, 1.0, 1.0, 0.3, 0.6)

    def distance(genome):
        return math.dist(genome, optimum)

    searcher = CmaEs(unit(6), seed, CmaEsOptions(bounds=bounds))
    assert best_of(searcher, 150, distance) == pytest.approx(optimum, abs=1e-5)
    late = proposals(searcher, 20, distance)
    share_on_bounds = mean(value in (0.0, 1.0) for genome in late for value in genome[:4])
    assert share_on_bounds == 0 if bounds == "transform" else share_on_bounds > 0.1


@pytest.mark.parametrize("seed", range(6))
def test_a_penalised_search_leaves_the_bound_again_when_that_pays(seed):
    searcher = CmaEs(unit(4), seed, CmaEsOptions(bounds="penalty"))
    at_bound = best_of(searcher, 60, sum)
    inside = best_of(searcher, 140, lambda genome: math.dist(genome, (0.4, 0.5, 0.6, 0.7)))
    assert at_bound == (0.0, 0.0, 0.0, 0.0)
    assert inside == pytest.approx((0.4, 0.5, 0.6, 0.7), abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_penalised_search_keeps_tuning_the_coordinates_that_belong_inside(seed):
    # Weights of 16 models of which most are useless, of unequal importance.
    optimum = tuple(0.0 if i % 4 else 0.2 + 0.04 * i for i in range(16))

    def loss(genome):
        return sum(
            10 ** (i % 3) * (value - target) ** 2
            for i, (value, target) in enumerate(zip(genome, optimum, strict=True))
        )

    found = best_of(CmaEs(unit(16), seed, CmaEsOptions(bounds="penalty")), 300, loss)
    assert found == pytest.approx(optimum, abs=2e-3)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_log_dimension_is_searched_by_ratios(bounds):
    dimensions = [
        Dimension(name="low", low=1e-6, high=1.0, start=1.0, log=True),
        Dimension(name="high", low=1.0, high=1e6, start=1.0, log=True),
    ]

    def distance(genome):
        return math.hypot(math.log(genome[0] / 3e-5), math.log(genome[1] / 2e3))

    found = best_of(CmaEs(dimensions, 1, CmaEsOptions(bounds=bounds)), 60, distance)
    assert found == pytest.approx((3e-5, 2e3), rel=1e-4)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("optimum", [0.0, 0.37])
def test_one_dimension_beside_constants_is_searched(optimum, bounds):
    constant = Dimension(name="fixed", low=2.0, high=2.0, start=2.0)
    searcher = CmaEs([constant, *unit(1), constant], 1, CmaEsOptions(bounds=bounds))
    found = best_of(searcher, 60, lambda genome: abs(genome[1] - optimum))
    assert found == (2.0, pytest.approx(optimum, abs=1e-5), 2.0)


def test_the_first_generation_surrounds_the_start_by_sigma():
    dimensions = [Dimension(name=f"t{i}", low=-2.0, high=2.0, start=1.0) for i in range(5)]
    genomes = CmaEs(dimensions, 1, CmaEsOptions(sigma=0.01, population=400)).ask()
    values = [value for genome in genomes for value in genome]
    assert mean(values) == pytest.approx(1.0, abs=0.005)
    assert pstdev(values) == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("start", [0.0, 2.0])
def test_the_starting_choice_leads_the_first_generation_without_being_alone(start, bounds):
    method = Dimension(
        name="method", low=0.0, high=3.0, start=start, kind=Kind.CATEGORICAL, choices=tuple("abcd")
    )
    genomes = CmaEs([method, *unit(2)], 1, CmaEsOptions(bounds=bounds, population=2000)).ask()
    shares = [mean(genome[0] == choice for genome in genomes) for choice in range(4)]
    # Four independent normal draws of deviation 1/6, one of which is 0.2 ahead, by quadrature: 0.614.
    assert shares.pop(int(start)) == pytest.approx(0.614, abs=0.045)
    assert shares == pytest.approx([(1 - 0.614) / 3] * 3, abs=0.035)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_search_converges_within_the_valid_half_although_better_lies_beyond(seed, bounds):
    searcher = CmaEs(unit(4, start=0.6), seed, CmaEsOptions(bounds=bounds))
    for _ in range(100):
        genomes = searcher.ask()
        searcher.tell([None if genome[0] < 0.5 else -sum(genome) for genome in genomes])
    assert mean(genome[0] for genome in searcher.ask()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("population", [4, 6])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_plateau_neither_shrinks_nor_widens_the_search(bounds, population):
    searcher = CmaEs(unit(2), 1, CmaEsOptions(bounds=bounds, population=population, sigma=0.05))
    spreads = []
    for _ in range(400):
        genomes = searcher.ask()
        searcher.tell([0.25] * population)
        spreads.append(mean(pstdev(column) for column in zip(*genomes, strict=True)))
    assert mean(spreads[-100:]) == pytest.approx(mean(spreads[:100]), rel=0.15)


@pytest.mark.parametrize("population", [4, 5, 6])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_fitness_in_steps_is_searched_from_plateau_to_plateau(bounds, population):
    def correct_of_20(genome):
        return math.floor(20 - 20 * math.dist(genome, (0.9, 0.1))) / 20

    searcher = CmaEs(unit(2, start=0.3), 0, CmaEsOptions(bounds=bounds, population=population))
    assert correct_of_20(best_of(searcher, 120, lambda genome: -correct_of_20(genome))) >= 0.95


@pytest.mark.parametrize("bounds", BOUNDS)
def test_steps_never_grow_beyond_a_third_of_the_range(bounds):
    searcher = CmaEs(unit(3), 1, CmaEsOptions(bounds=bounds, sigma=1 / 3))
    for _ in range(100):
        genomes = searcher.ask()
        searcher.tell([math.dist(genome, (0.5,) * 3) for genome in genomes])
        assert max(searcher._strategy.stds) <= 1 / 3 + 1e-3


@pytest.mark.parametrize("bounds", BOUNDS)
def test_only_the_order_of_fitness_counts(bounds):
    plain, stretched = (CmaEs(unit(4), 1, CmaEsOptions(bounds=bounds)) for _ in range(2))
    for _ in range(40):
        genomes = plain.ask()
        assert stretched.ask() == genomes
        plain.tell([-sum(genome) for genome in genomes])
        stretched.tell([1e6 * math.exp(-10 * sum(genome)) for genome in genomes])


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("num_dimensions", [1, 3])
def test_a_search_far_beyond_convergence_keeps_proposing(num_dimensions, bounds):
    # Without any termination criterion the steps shrink to the resolution of floats; warnings are errors.
    searcher = CmaEs(unit(num_dimensions), 1, CmaEsOptions(bounds=bounds))
    best = best_of(searcher, 1500, lambda genome: sum((value - 0.3) ** 2 for value in genome))
    assert best == pytest.approx((0.3,) * num_dimensions, abs=1e-8)


def test_hundreds_of_dimensions_with_plateaus_are_searched():
    searcher = CmaEs(unit(310), 1, CmaEsOptions())
    for generation in range(4):
        genomes = searcher.ask()
        searcher.tell([0.0 if generation % 2 else -sum(genome) for genome in genomes])
    assert len(set(searcher.ask())) == searcher.population
