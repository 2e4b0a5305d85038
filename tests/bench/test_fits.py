import math

import pytest

from sparsemem.bench.fits import fitted, log_slope
from sparsemem.bench.measuring import Summary
from sparsemem.bench.results import Measured

# Plain numbers: an int serves as a float.
pytestmark = pytest.mark.usefixtures("plain_errors")


def point(size, seconds):
    times = {"step": Summary.of([seconds])}
    return Measured(kind="model", name="x", size=size, steps=1, times=times, figures={})


def seconds(point):
    return point.times["step"].median


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0, -0.5])
def test_the_slope_of_a_power_law_is_its_exponent(slope):
    sizes = [2**n for n in range(3, 9)]
    found = log_slope(sizes, [7 * size**slope for size in sizes])
    assert found.slope == pytest.approx(slope, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_the_standard_error_is_that_of_least_squares():
    # log y = (0, 1, 0) over log x = (0, 1, 2): slope 0, residuals (-1/3, 2/3, -1/3).
    found = log_slope([1, math.e, math.e**2], [1, math.e, 1])
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert found.error == pytest.approx(math.sqrt(6 / 9 / 1 / 2))
    assert log_slope([1, 2], [1, 2]).error is None


def test_what_grows_is_fitted_to_its_largest_sizes():
    points = [point(size, 1.0 + size) for size in (1, 10, 10**4, 10**5, 10**6)]
    fit = fitted(points[::-1], "s", seconds, order=1.0)
    assert fit.sizes == [10**4, 10**5, 10**6]
    assert fit.slope == pytest.approx(1, abs=1e-4)
    assert fitted(points, "s", seconds, order=0.0).sizes[0] == 1
    assert fitted(points[:1], "s", seconds, 0.0) is None
    assert fitted([point(1, 0.0), point(2, 1.0)], "s", seconds, 0.0) is None
