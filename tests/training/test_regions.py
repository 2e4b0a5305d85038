import pytest

from sparsemem.training.regions import Stopwatch, in_region, listening, region


@pytest.fixture
def clock():
    """A clock that the test advances."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_a_region_does_not_count_the_regions_inside_it(clock):
    stopwatch = Stopwatch(clock)
    with listening(stopwatch):
        with region("outer"):
            clock.now += 1
            with region("inner"):
                clock.now += 10
                with region("outer"):
                    clock.now += 100
            clock.now += 1000
        clock.now += 5  # in no region
        with region("inner"):
            clock.now += 20
    assert stopwatch.seconds == {"outer": 1101, "inner": 30}


def test_an_exception_leaves_the_region(clock):
    stopwatch = Stopwatch(clock)

    def fails():
        clock.now += 1
        raise KeyError

    with listening(stopwatch), region("outer"):
        with pytest.raises(KeyError):
            in_region("inner", fails)()
        clock.now += 10
    assert stopwatch.seconds == {"outer": 10, "inner": 1}


def test_nothing_is_timed_while_nobody_listens(clock):
    stopwatch = Stopwatch(clock)
    with listening(stopwatch):
        pass
    with region("x"):
        clock.now += 1
    assert stopwatch.seconds == {}


def test_a_function_can_be_a_region(clock):
    def work(x, y=1):
        """What it does."""
        clock.now += 2
        return x + y

    timed = in_region("work", work)
    stopwatch = Stopwatch(clock)
    with listening(stopwatch):
        assert timed(1, y=2) == 3
    assert stopwatch.seconds == {"work": 2}
    assert timed.__doc__ == "What it does."
