import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evomerge.records import Dimension, Kind
from evomerge.search.units import START_CHOSEN, START_OTHER, UnitCube

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def dimensions(draw):
    log = draw(st.booleans())
    low, start, high = sorted(draw(st.tuples(*[POSITIVE if log else NUMBERS] * 3)))
    return Dimension(name="d", low=low, high=high, start=start, log=log)


def integer(low, high, start):
    return Dimension(name="layer", low=low, high=high, start=start, kind=Kind.INTEGER)


def choice(choices="abc", start=0.0, **change):
    found = Dimension(
        name="method",
        low=0.0,
        high=len(choices) - 1.0,
        start=start,
        kind=Kind.CATEGORICAL,
        choices=tuple(choices),
    )
    return dataclasses.replace(found, **change)


@st.composite
def integers(draw):
    whole = st.one_of(st.integers(-9, 9), st.integers(-(2**53), 2**53)).map(float)
    low, start, high = sorted(draw(st.tuples(whole, whole, whole)))
    return integer(low, high, start)


def dimension(low=0.0, high=1.0, start=0.5, log=False):
    return Dimension(name="weight[math]", low=low, high=high, start=start, log=log)


@given(dimensions(), st.floats(0, 1))
@example(dimension(low=-1e308, high=1e308, start=0), 0.3)
@example(dimension(low=5e-324, high=1e308, start=1, log=True), 0.7)
@example(dimension(low=0.1, high=math.nextafter(0.1, 1), start=0.1), 0.5)
@example(dimension(low=0.1, high=math.nextafter(0.1, 1), start=0.1, log=True), 0.5)
def test_no_point_of_the_cube_leaves_the_bounds(d, u):
    cube = UnitCube([d])
    (value,) = cube.genome([u] * cube.size)
    assert d.low <= value <= d.high


@given(integers(), st.floats(0, 1))
@example(integer(0.0, 2.0, 0.0), math.nextafter(1, 0))
@example(integer(-(2.0**53), 2.0**53, 0.0), math.nextafter(1, 0))
def test_every_point_of_an_integer_s_coordinate_is_a_whole_number_within_its_bounds(d, u):
    cube = UnitCube([d])
    (value,) = cube.genome([u] * cube.size)
    assert type(value) is float
    assert value.is_integer()
    assert d.low <= value <= d.high


@given(integers())
def test_the_start_of_an_integer_comes_back_exactly_unless_its_bins_are_finer_than_floats(d):
    cube = UnitCube([d])
    (value,) = cube.genome(cube.start)
    assert value == pytest.approx(d.start, abs=2**-50 * (d.high - d.low))


@given(st.one_of(dimensions(), integers()))
def test_the_corners_of_the_cube_are_the_bounds_exactly(d):
    cube = UnitCube([d])
    assert cube.genome([0.0] * cube.size) == (d.low,)
    assert cube.genome([1.0] * cube.size) == (d.high,)


@given(
    st.floats(1e-6, 1e6),
    st.floats(1e-6, 1e6),
    st.floats(1e-6, 1e6),
    st.booleans(),
)
def test_the_start_comes_back_from_the_cube(a, b, c, log):
    low, start, high = sorted([a, b, c])
    cube = UnitCube([dimension(low=low, high=high, start=start, log=log)])
    assert cube.genome(cube.start)[0] == pytest.approx(start, rel=1e-12, abs=1e-12 * (high - low))


def test_the_widest_dimension_has_its_start_where_it_belongs():
    assert UnitCube([dimension(low=-1.6e308, high=1.6e308, start=0.8e308)]).start == (0.75,)


def test_equal_steps_are_equal_differences_or_on_a_log_scale_equal_ratios():
    cube = UnitCube([dimension(low=-1, high=3, start=0), dimension(low=1e-4, high=1, start=1e-2, log=True)])
    assert cube.start == pytest.approx((0.25, 0.5))
    assert cube.genome([0.75, 0.25]) == pytest.approx((2.0, 1e-3))


def test_a_constant_dimension_takes_no_coordinate_and_keeps_its_value():
    cube = UnitCube([dimension(low=0.1, high=0.1, start=0.1), dimension(), dimension(2, 2, 2, log=True)])
    assert cube.size == 1
    assert cube.genome([0.3]) == (0.1, 0.3, 2)


def test_an_integer_has_one_coordinate_with_a_bin_of_equal_size_per_whole_number():
    cube = UnitCube([integer(-1.0, 2.0, 1.0)])
    edges = [0.0, 0.25, 0.5, 0.75]
    assert cube.start == (0.625,)
    assert [cube.genome([u]) for u in edges] == [(-1.0,), (0.0,), (1.0,), (2.0,)]
    assert [cube.genome([math.nextafter(u, 0)]) for u in [*edges[1:], 1]] == [(-1.0,), (0.0,), (1.0,), (2.0,)]
    assert cube.genome([1.0]) == (2.0,)


def test_a_choice_has_a_coordinate_per_name_and_takes_the_largest_the_first_among_equals():
    cube = UnitCube([dimension(), choice("abcd", start=2.0), dimension()])
    assert cube.size == 6
    assert cube.genome([0.5, 0.1, 0.3, 0.2, 0.9, 0.5]) == (0.5, 3.0, 0.5)
    assert cube.genome([1.0, 0.1, 0.3, 0.2, 0.3, 0.0]) == (1.0, 1.0, 0.0)
    assert cube.genome([0.0] * 6) == (0.0, 0.0, 0.0)
    assert all(type(value) is float for value in cube.genome([0] * 6))


def test_the_starting_choice_is_ahead_of_the_others():
    cube = UnitCube([choice("abcd", start=2.0), dimension()])
    assert cube.start == (START_OTHER, START_OTHER, START_CHOSEN, START_OTHER, 0.5)
    assert pytest.approx(0.2) == START_CHOSEN - START_OTHER
    assert cube.genome(cube.start) == (2.0, 0.5)


def test_constant_integers_and_choices_take_no_coordinate():
    cube = UnitCube([integer(3.0, 3.0, 3.0), choice("a"), integer(0.0, 1.0, 0.0)])
    assert cube.size == 1
    assert cube.genome([0.5]) == (3.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("impossible", "complaint"),
    [
        (integer(0.5, 3.0, 1.0), "whole numbers"),
        (integer(0.0, 3.5, 1.0), "whole numbers"),
        (integer(0.0, 3.0, 1.5), "whole numbers"),
        (integer(0.0, 2.0**54, 1.0), r"whole numbers up to 2\^53"),
        (dataclasses.replace(integer(1.0, 8.0, 1.0), log=True), "log scale is for continuous"),
        (choice(log=True), "log scale is for continuous"),
        (choice(start=0.5), "whole numbers"),
        (choice(start=3.0), "low <= start <= high"),
        (choice(low=-1.0), "position of the last of its choices"),
        (choice(high=3.0), "position of the last of its choices"),
        (choice(high=1.0), "position of the last of its choices"),
        (choice(high=0.0, choices=()), "position of the last of its choices"),
    ],
)
def test_an_impossible_integer_or_choice_is_refused_by_name(impossible, complaint):
    with pytest.raises(ValueError, match=rf"dimension (layer|method): .*{complaint}"):
        UnitCube([dimension(), impossible])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"start": 1.5}, "low <= start <= high"),
        ({"start": -0.5}, "low <= start <= high"),
        ({"low": 2.0}, "low <= start <= high"),
        ({"log": True}, "low > 0"),
        ({"high": math.inf}, "finite"),
        ({"start": math.nan}, "finite"),
    ],
)
def test_an_impossible_dimension_is_refused_by_name(change, complaint):
    with pytest.raises(ValueError, match=rf"weight\[math\].*{complaint}"):
        UnitCube([dimension(), dataclasses.replace(dimension(), **change)])


def test_a_search_without_dimensions_is_refused():
    with pytest.raises(ValueError, match="at least one dimension"):
        UnitCube([])
