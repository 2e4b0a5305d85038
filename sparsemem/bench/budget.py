"""A budget of time, and what a larger point will cost, from what smaller ones did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Clock = Callable[[], float]
STEEPER = 0.3  # that a cost may grow, as an exponent, than it should: noise is not believed beyond


class Budget:
    """Seconds that may be spent from now on."""

    def __init__(self, limit: float, clock: Clock = time.monotonic) -> None:
        self.limit, self._clock = limit, clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """Seconds since the budget began."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 once it is overdrawn."""
        return self.limit - self.spent

    def part(self, share: float) -> Budget:
        """A budget of its own that begins now, of a share of what is left."""
        return Budget(max(self.left, 0) * share, self._clock)


class Cost(NamedTuple):
    """What a point takes: `unit` is a step of a model, or one repetition of a bank's work."""

    start: float  # seconds to make it and warm it up, beside imports and repetitions
    unit: float  # seconds
    bytes: float  # of a unit


def extrapolated(history: Sequence[tuple[int, float]], size: int, order: float) -> float:
    """The value at `size`, from values at smaller sizes, ascending.

    A power law through the last value, with the exponent between the last two or `order`, which
    the cost has in theory, whichever is larger: small sizes are ruled by constant costs.
    """
    last, value = history[-1]
    slope = order
    if len(history) > 1 and value > 0 and history[-2][1] > 0:
        before, value_before = history[-2]
        measured = math.log(value / value_before) / math.log(last / before)
        slope = min(max(measured, order), order + STEEPER)
    return value * math.pow(size / last, slope)


def predicted(history: Sequence[tuple[int, Cost]], size: int, order: float) -> Cost | None:
    """What a point will take; None where nothing has been measured yet."""
    if not history:
        return None
    columns = ([(at, cost[field]) for at, cost in history] for field in range(len(Cost._fields)))
    return Cost(*(extrapolated(column, size, order) for column in columns))
