"""Checks of optimiser options: each error names the option, its value and what was expected."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def check_range(name: str, value: Any, minimum: float, below: float = math.inf) -> float:
    """Return `value` as a number, if it is one from `minimum` to less than `below`."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    fits = isinstance(number, int | float) and not isinstance(number, bool)
    if not fits or not minimum <= number < below:
        end = "finite" if below == math.inf else f"below {below}"
        raise ValueError(f"{name} is {value!r}, expected a number of at least {minimum}, {end}")
    return float(number)


def check_above_zero(name: str, value: Any) -> float:
    """Return `value` as a number, if it is a finite one above 0."""
    if not check_range(name, value, 0.0):
        raise ValueError(f"{name} is {value!r}, expected a number above 0")
    return float(value)


def check_betas(value: Any) -> tuple[float, float]:
    """Return `value` if it is a pair of numbers from 0 to less than 1."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"betas is {value!r}, expected two numbers")
    first, second = (check_range(f"betas[{i}]", beta, 0.0, 1.0) for i, beta in enumerate(value))
    return first, second
