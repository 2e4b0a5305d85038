from collections import Counter

import pytest

from sparsemem.training.config import Curriculum
from sparsemem.training.curriculum import Exponential, draw, make_curriculum


def exponential(**changes):
    options = {"seed": 0, "minimum": 1, "initial": 2, "maximum": 10, "threshold": 0.1, "window": 3}
    return Exponential(**{**options, **changes})


def test_draws_are_uniform_and_a_function_of_seed_and_step():
    counts = Counter(draw(5, step, 2, 6) for step in range(5000))
    assert sorted(counts) == [2, 3, 4, 5, 6]
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations
    assert [draw(5, s, 1, 100) for s in range(9)] == [draw(5, s, 1, 100) for s in range(9)]
    assert [draw(5, s, 1, 100) for s in range(9)] != [draw(6, s, 1, 100) for s in range(9)]


def test_h_doubles_once_a_full_window_is_under_the_threshold():
    curriculum = exponential()
    assert [curriculum.update(loss) for loss in (0.05, 0.05)] == [False, False]
    assert curriculum.update(0.05)
    assert curriculum.hardest == 4
    # The window starts anew; its mean decides, and old losses leave it.
    updates = [curriculum.update(loss) for loss in (9.0, 0.2, 0.05, 0.04)]
    assert updates == [False, False, False, True]
    assert curriculum.hardest == 8


def test_a_mean_at_the_threshold_is_not_under_it():
    curriculum = exponential(threshold=0.25, window=2)
    assert not curriculum.update(0.25)
    assert not curriculum.update(0.25)
    assert curriculum.hardest == 2


def test_h_stops_at_the_maximum():
    curriculum = exponential(initial=8, window=1)
    assert curriculum.update(0.0)
    assert curriculum.hardest == 10
    assert not curriculum.update(0.0)
    assert {curriculum.level(step) for step in range(300)} == set(range(1, 11))


def test_state_goes_on_with_the_same_decisions():
    one = exponential()
    one.update(0.0)
    one.update(0.0)
    other = exponential()
    other.load_state_dict(one.state_dict())
    assert one.update(0.0)
    assert other.update(0.0)
    assert one.state_dict() == other.state_dict() == {"hardest": 4, "losses": []}


def test_the_config_chooses():
    fixed = make_curriculum(Curriculum(minimum=3, maximum=5), seed=1)
    assert {fixed.level(step) for step in range(100)} == {3, 4, 5}
    assert fixed.hardest == 5
    assert not fixed.update(0.0)
    config = Curriculum(name="exponential", minimum=2, maximum=8, window=1)
    growing = make_curriculum(config, seed=1)
    assert {growing.level(step) for step in range(20)} == {2}
    assert growing.update(0.0)
    assert growing.hardest == 4


@pytest.mark.parametrize("name", ["fixed", "exponential"])
def test_levels_do_not_depend_on_what_was_drawn_before(name):
    config = Curriculum(name=name, minimum=1, initial=9 if name != "fixed" else None, maximum=9)
    one, other = make_curriculum(config, 3), make_curriculum(config, 3)
    assert [one.level(s) for s in range(20)][10:] == [other.level(s) for s in range(10, 20)]
