import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evomerge.records import Dimension
from evomerge.search.units import UnitCube

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def dimensions(draw):
    log = draw(st.booleans())
    low, start, high = sorted(draw(st.tuples(*[POSITIVE if log else NUMBERS] * 3)))
    return Dimension(name="d", low=low, high=high, start=start, log=log)


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


@given(dimensions())
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
