"""How measures grow with size: slopes of log-log lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sparsemem.bench.results import Fit, Measured

LAST = 3  # sizes that show how a cost that grows does so in the end


class Slope(NamedTuple):
    """Exponent of a power law and its standard error (None: of two points there is none)."""

    slope: float
    error: float | None


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> Slope:
    """Least squares of log(value) over log(size), for at least two different sizes."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    x, y = x - x.mean(), y - y.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread
    if len(x) == 2:
        return Slope(slope, None)
    left = y - slope * x
    return Slope(slope, math.sqrt(float(left @ left) / (len(x) - 2) / spread))


def fitted(
    points: Iterable[Measured], measure: str, value: Callable[[Measured], float], order: float
) -> Fit | None:
    """The fit of one series; None of fewer than two sizes, or of values that are zero.

    Of a cost that grows (order above 0) only the largest sizes count: small ones are ruled by what
    is constant.
    """
    ordered = sorted(points, key=lambda point: point.size)
    if order > 0:
        ordered = ordered[-LAST:]
    values = [value(point) for point in ordered]
    if len(ordered) < 2 or min(values) <= 0:
        return None
    sizes = [point.size for point in ordered]
    slope, error = log_slope(sizes, values)
    first = ordered[0]
    return Fit(
        kind=first.kind, name=first.name, measure=measure, slope=slope, error=error, sizes=sizes
    )
