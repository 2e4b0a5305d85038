"""Random cases: some in every run, many more among the slow tests."""

import pytest

OFTEN = 10


def seeds(number, often=OFTEN, *values):
    """Parameters (*values, seed); those from `often` on are slow tests."""
    slow = pytest.mark.slow
    return [
        pytest.param(*values, seed, marks=slow if seed >= often else ()) for seed in range(number)
    ]
