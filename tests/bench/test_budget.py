import pytest

from sparsemem.bench.budget import Budget, Cost, extrapolated, predicted

# Plain numbers: an int serves as a float.
pytestmark = pytest.mark.usefixtures("plain_errors")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_budget_counts_from_when_it_began_and_parts_share_what_is_left():
    clock = Clock()
    budget = Budget(60, clock)
    clock.now += 20
    assert (budget.spent, budget.left) == (20, 40)
    part = budget.part(0.5)
    clock.now += 15
    assert (part.left, budget.left) == (5, 25)
    clock.now += 100
    assert part.left < 0
    assert budget.part(1.0).limit == 0


def test_a_cost_grows_at_least_as_in_theory():
    # Constant so far, but it is known to grow with N^2.
    assert extrapolated([(10, 3.0), (20, 3.0)], 40, 2.0) == pytest.approx(12.0)
    # Steeper than in theory: as measured, up to a limit.
    assert extrapolated([(10, 1.0), (20, 2.2)], 40, 1.0) == pytest.approx(2.2 * 2.2)
    assert extrapolated([(10, 1.0), (20, 64.0)], 40, 1.0) == pytest.approx(64 * 2**1.3)
    # What does not grow is not made to by noise that falls.
    assert extrapolated([(10, 2.0), (20, 1.0)], 2**30, 0.0) == pytest.approx(1.0)


def test_each_part_of_a_cost_is_predicted_on_its_own():
    history = [(10, Cost(1.0, 0.1, 100.0)), (20, Cost(2.0, 0.2, 200.0))]
    assert predicted(history, 40, 1.0) == pytest.approx((4.0, 0.4, 400.0))
    assert predicted([], 40, 1.0) is None
