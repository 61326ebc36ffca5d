"""The contract of every searcher in the table, and the table itself."""

import math
import os
import random
import subprocess
import sys

import numpy
import pytest
from pydantic import ValidationError

from evomerge.errors import ConfigurationError
from evomerge.records import Dimension, Kind
from evomerge.search import SEARCHERS, build_searcher

VARIANTS = {
    "cma-es": [{"bounds": "penalty"}, {"population": 4}, {"sigma": 1 / 3, "population": 5}],
    "catcma": [{"population": 4}, {"sigma": 1 / 3, "population": 5}],
}
CASES = [(name, options) for name in SEARCHERS for options in [{}, *VARIANTS.get(name, [])]]


def integer(name, low, high, start):
    return Dimension(name=name, low=low, high=high, start=start, kind=Kind.INTEGER)


def choice(name, choices, start=0.0):
    return Dimension(
        name=name,
        low=0.0,
        high=len(choices) - 1.0,
        start=start,
        kind=Kind.CATEGORICAL,
        choices=tuple(choices),
    )


SPACES = {
    "mixed": [
        Dimension(name="weight", low=-0.5, high=1.5, start=0.2),
        Dimension(name="scale", low=1e-4, high=10.0, start=1.0, log=True),
        Dimension(name="fixed", low=0.7, high=0.7, start=0.7),
        Dimension(name="density", low=0.1, high=1.0, start=1.0),
    ],
    "one linear": [Dimension(name="t", low=0.0, high=1.0, start=0.0)],
    "one log": [Dimension(name="t", low=1e-3, high=1e3, start=1.0, log=True)],
    "one of two constant": [
        Dimension(name="t", low=0.0, high=1.0, start=0.5),
        Dimension(name="fixed", low=3.0, high=3.0, start=3.0, log=True),
    ],
    "all constant": [Dimension(name="fixed", low=0.1, high=0.1, start=0.1)],
    "hardly wide": [
        Dimension(name=f"t{i}", low=0.1, high=math.nextafter(0.1, 1), start=0.1) for i in range(3)
    ],
    "all kinds": [
        Dimension(name="weight", low=0.0, high=1.0, start=0.0),
        choice("method", "abcde", start=3.0),
        integer("layer", -3.0, 20.0, -3.0),
        choice("only", "a"),
        Dimension(name="scale", low=1e-2, high=1e2, start=1.0, log=True),
        integer("repeats", 1.0, 3.0, 3.0),
        integer("fixed", 4.0, 4.0, 4.0),
        integer("flag", 0.0, 1.0, 1.0),
        choice("side", "lr", start=1.0),
    ],
    "integers": [integer(f"i{i}", -2.0, 6.0 + i, 4.0) for i in range(5)],
    "one integer": [integer("i", 0.0, 40.0, 7.0)],
    "choices": [choice(f"c{i}", "abcd"[: 2 + i % 3], start=float(i % 2)) for i in range(8)],
    "one choice": [choice("c", "ab")],
    "one number among choices": [choice("a", "abc"), integer("i", 0.0, 5.0, 2.0), choice("b", "ab")],
}
KINDS = ["mixed", "all kinds", "one integer", "one choice", "one number among choices"]


@pytest.fixture(params=CASES, ids=lambda case: " ".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]))
def make(request):
    """Builds the searcher under test."""
    name, options = request.param
    spec = SEARCHERS[name]

    def build(space="mixed", seed=1):
        dimensions = SPACES[space] if isinstance(space, str) else space
        return build_searcher(name, dimensions, seed, spec.options(**options))

    return build


def fitness(genome):
    return -sum((value - 0.4) ** 2 for value in genome)


def run(searcher, num_generations, judge=fitness):
    """Asks and tells; returns the generations with their fitness."""
    history = []
    for _ in range(num_generations):
        genomes = searcher.ask()
        fitnesses = [judge(genome) for genome in genomes]
        searcher.tell(fitnesses)
        history.append((genomes, fitnesses))
    return history


@pytest.mark.parametrize("space", SPACES)
def test_a_generation_has_the_population_s_size_and_stays_within_the_bounds(make, space):
    searcher = make(space)
    for genomes, _ in run(searcher, 40, judge=sum):
        assert len(genomes) == searcher.population
        for genome in genomes:
            assert isinstance(genome, tuple)
            assert all(type(value) is float for value in genome)
            assert all(d.low <= value <= d.high for d, value in zip(SPACES[space], genome, strict=True))
            assert all(
                value.is_integer()
                for d, value in zip(SPACES[space], genome, strict=True)
                if d.kind is not Kind.CONTINUOUS
            )


@pytest.mark.parametrize("space", KINDS)
def test_the_same_seed_proposes_the_same_genomes_and_another_seed_others(make, space):
    assert run(make(space, seed=5), 15) == run(make(space, seed=5), 15)
    assert run(make(space, seed=5), 3) != run(make(space, seed=6), 3)


@pytest.mark.parametrize("space", KINDS)
def test_a_replayed_searcher_goes_on_exactly_as_the_first_would_have(make, space):
    def patchy(genome):
        return None if genome[0] > 0.9 and sum(genome) > 3 else round(fitness(genome), 2)

    first = make(space)
    recorded = run(first, 12, patchy)
    replayed = make(space)
    for genomes, fitnesses in recorded:
        assert replayed.ask() == genomes
        replayed.tell(fitnesses)
    assert run(replayed, 5, patchy) == run(first, 5, patchy)


def test_two_searchers_in_one_process_do_not_disturb_each_other(make):
    alone = run(make(seed=3), 6)
    one, other = make(seed=3), make(seed=4)
    interleaved = []
    for _ in range(6):
        interleaved += run(one, 1)
        run(other, 1)
    assert interleaved == alone


def seed_globals(seed):
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002


def global_states():
    return random.getstate(), numpy.random.get_state(legacy=False)  # noqa: NPY002


@pytest.mark.parametrize("space", ["mixed", "all kinds"])
def test_global_random_generators_are_neither_read_nor_written(make, space):
    seed_globals(1)
    before = global_states()
    history = run(make(space), 8)
    numpy.testing.assert_equal(global_states(), before)
    seed_globals(2)
    assert run(make(space), 8) == history


def test_asking_again_before_telling_is_refused(make):
    searcher = make()
    genomes = searcher.ask()
    with pytest.raises(RuntimeError, match="told"):
        searcher.ask()
    searcher.tell([fitness(genome) for genome in genomes])
    searcher.ask()


def test_telling_without_a_waiting_generation_is_refused(make):
    searcher = make()
    with pytest.raises(RuntimeError, match="without a generation"):
        searcher.tell([0.0] * searcher.population)
    run(searcher, 1)
    with pytest.raises(RuntimeError, match="without a generation"):
        searcher.tell([0.0] * searcher.population)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_fitness_that_is_not_finite_is_refused_and_can_be_told_again(make, bad):
    searcher, other = make(), make()
    genomes = searcher.ask()
    fitnesses = [fitness(genome) for genome in genomes]
    with pytest.raises(ValueError, match="fitness 2 must be finite"):
        searcher.tell([*fitnesses[:2], bad, *fitnesses[3:]])
    searcher.tell(fitnesses)
    run(other, 1)
    assert searcher.ask() == other.ask()


@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_wrong_count_of_fitnesses_is_refused(make, surplus):
    searcher = make()
    searcher.ask()
    with pytest.raises(ValueError, match="one per genome"):
        searcher.tell([0.0] * (searcher.population + surplus))


def test_the_callers_lists_are_left_as_they_were(make):
    searcher = make()
    genomes = searcher.ask()
    fitnesses = [None, *(fitness(genome) for genome in genomes[1:])]
    asked, told = list(genomes), list(fitnesses)
    searcher.tell(fitnesses)
    searcher.ask()
    assert genomes == asked
    assert fitnesses == told


@pytest.mark.parametrize(
    ("space", "valid_up_to"), [("mixed", 0.3), ("all kinds", 0.3), ("integers", 4), ("choices", 0)]
)
def test_none_counts_like_a_number_below_all_others(make, space, valid_up_to):
    def invalid(genome):
        return genome[0] > valid_up_to

    with_none = run(make(space), 15, lambda genome: None if invalid(genome) else fitness(genome))
    with_number = run(make(space), 15, lambda genome: -1e9 if invalid(genome) else fitness(genome))
    assert any(None in fitnesses and set(fitnesses) != {None} for _, fitnesses in with_none)
    assert [genomes for genomes, _ in with_none] == [genomes for genomes, _ in with_number]


def test_generations_without_a_single_valid_candidate_are_survived(make):
    searcher = make()
    for genomes, _ in run(searcher, 30, lambda genome: None):
        assert len(set(genomes)) == searcher.population
    run(searcher, 5)


@pytest.mark.parametrize("space", KINDS)
def test_one_fitness_for_all_says_nothing(make, space):
    """A generation of equals is forgotten: the next one is drawn from the same distribution."""
    searcher, other = make(space), make(space)
    constant = [run(searcher, 1, lambda genome: 0.5)[0][0] for _ in range(6)]
    assert constant == [run(other, 1, lambda genome: None)[0][0] for _ in range(6)]
    assert run(searcher, 5) == run(other, 5)


def off_target(dimensions, optimum):
    """Squared distance to the optimum in shares of each range; a wrong choice counts a quarter."""

    def loss(genome):
        return sum(
            (value != target) / 4
            if d.kind is Kind.CATEGORICAL
            else ((value - target) / (d.high - d.low)) ** 2
            for d, value, target in zip(dimensions, genome, optimum, strict=True)
        )

    return loss


def numbers(count):
    return [Dimension(name=f"w{i}", low=-1.0, high=1.0, start=0.0) for i in range(count)]


PROBLEMS = {
    "sphere": (numbers(6), [-0.7, 0.2, 0.5, -0.4, 0.8, 0.1], 1e-8),
    "integers": (
        [integer(f"i{i}", 0.0, 15.0 + i, 8.0) for i in range(6)],
        [2.0, 0.0, 13.0, 5.0, 19.0, 9.0],
        0,
    ),
    "choices": ([choice(f"c{i}", "abcd") for i in range(8)], [0.0, 3.0, 2.0, 1.0, 0.0, 2.0, 3.0, 1.0], 0),
    "all kinds": (
        [*numbers(3), *[integer(f"i{i}", 1.0, 9.0, 5.0) for i in range(3)], *SPACES["choices"][:3]],
        [-0.7, 0.2, 0.5, 1.0, 7.0, 4.0, 1.0, 2.0, 0.0],
        1e-3,
    ),
}
"""Dimensions, the genome without loss, and the loss to reach in 1000 evaluations."""


def best_loss(searcher, loss, num_evaluations):
    losses = []
    while len(losses) < num_evaluations:
        losses += [-told for _, fitnesses in run(searcher, 1, lambda g: -loss(g)) for told in fitnesses]
    return min(losses[:num_evaluations])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in SEARCHERS if name != "random" for options in [{}, *VARIANTS[name][:1]]],
)
def test_a_problem_of_any_kind_is_solved_where_random_search_is_lost(name, options, problem):
    dimensions, optimum, target = PROBLEMS[problem]
    loss = off_target(dimensions, optimum)
    for seed in range(3):
        searcher = build_searcher(name, dimensions, seed, SEARCHERS[name].options(**options))
        assert best_loss(searcher, loss, 1000) <= target
        assert best_loss(build_searcher("random", dimensions, seed), loss, 1000) > 0.02


def test_a_name_outside_the_table_is_refused_with_the_nearest_one():
    with pytest.raises(
        ConfigurationError, match=r"catcma, cma-es, random, got 'cmaes' \(did you mean 'cma-es'\?\)"
    ):
        build_searcher("cmaes", SPACES["mixed"], 1)


def test_options_of_another_searcher_are_refused():
    with pytest.raises(TypeError, match="cma-es takes CmaEsOptions, got RandomOptions"):
        build_searcher("cma-es", SPACES["mixed"], 1, SEARCHERS["random"].options())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cma-es", {"population": 3}),
        ("cma-es", {"population": 8.5}),
        ("cma-es", {"sigma": 0}),
        ("cma-es", {"sigma": 0.4}),
        ("cma-es", {"sigma": math.nan}),
        ("cma-es", {"bounds": "clip"}),
        ("cma-es", {"step": 0.1}),
        ("catcma", {"population": 3}),
        ("catcma", {"sigma": 0.4}),
        ("catcma", {"bounds": "clip"}),
        ("random", {"population": 0}),
        ("random", {"sigma": 0.1}),
    ],
)
def test_an_option_that_is_unknown_or_out_of_range_is_refused(name, options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        SEARCHERS[name].options(**options)


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_option_and_searcher_is_described(name):
    spec = SEARCHERS[name]
    assert spec.summary.endswith(".")
    assert spec.reference.startswith("https://")
    assert all(field.description for field in spec.options.model_fields.values())
    assert not any(field.is_required() for field in spec.options.model_fields.values())


@pytest.mark.parametrize(("num_dimensions", "population"), [(1, 4), (2, 6), (8, 10), (30, 14)])
def test_the_default_population_grows_with_the_logarithm_of_what_is_searched(
    make, num_dimensions, population
):
    searched = [Dimension(name=f"t{i}", low=0.0, high=1.0, start=0.5) for i in range(num_dimensions)]
    constant = [Dimension(name=f"c{i}", low=1.0, high=1.0, start=1.0) for i in range(20)]
    for name in SEARCHERS:
        assert build_searcher(name, searched + constant, 1).population == population


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_choice_counts_once_per_name_in_the_default_population(name):
    dimensions = [choice("method", "abcde"), integer("layer", 0.0, 30.0, 3.0), *numbers(2)]
    assert build_searcher(name, dimensions, 1).population == 4 + math.floor(3 * math.log(8))


def in_fresh_process(program, cwd):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_table_loads_no_optimiser_and_nothing_of_models(tmp_path):
    loaded = in_fresh_process("import sys, evomerge.search; print(*sys.modules)", tmp_path).split()
    assert not {"cma", "cmaes", "scipy", "matplotlib", "torch", "ray", "transformers"} & set(loaded)
    ours = {
        name for name in loaded if name.startswith("evomerge.") and not name.startswith("evomerge.search")
    }
    assert ours == {"evomerge.errors", "evomerge.records"}


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_search_in_a_fresh_process_writes_nothing_and_leaves_global_state_alone(name, tmp_path):
    program = f"""
import random, warnings
import numpy
from evomerge.records import Dimension, Kind
from evomerge.search import build_searcher

def state():
    return repr((random.getstate(), numpy.random.get_state(legacy=False), numpy.geterr(), warnings.filters))

before = state()
weight = Dimension(name="t", low=0.0, high=1.0, start=0.5)
layer = Dimension(name="i", low=0.0, high=9.0, start=5.0, kind=Kind.INTEGER)
method = Dimension(name="c", low=0.0, high=2.0, start=1.0, kind=Kind.CATEGORICAL, choices=("a", "b", "c"))
searcher = build_searcher({name!r}, [weight, layer, method] * 2, 1)
for _ in range(60):
    searcher.tell([sum(genome) for genome in searcher.ask()])
assert state() == before
"""
    assert in_fresh_process(program, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
