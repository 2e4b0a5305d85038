"""The budget and the turns, with points that only say what they take."""

import pytest

from sparsemem.bench.budget import Budget
from sparsemem.bench.schedule import Schedule, Series
from sparsemem.bench.workers import WorkerError

# Plain numbers: an int serves as a float.
pytestmark = pytest.mark.usefixtures("plain_errors")

GIB = 2**30


class Machine:
    """A clock that work advances, memory that work takes, and a diary."""

    def __init__(self, memory=100 * GIB):
        self.now, self.memory, self.diary, self.open = 0.0, memory, [], 0
        self.fails = {}

    def clock(self):
        return self.now

    def start(self, point):
        self.open += 1
        return Worker(self, *point)


class Worker:
    def __init__(self, machine, name, size, units, seconds, peak):
        self.machine, self.name, self.size = machine, name, size
        self.units, self.seconds, self.peak = units, seconds, peak

    def made(self, limit):
        self.machine.now += 2 + self.seconds
        if (self.name, self.size) in self.machine.fails:
            raise WorkerError(self.machine.fails[self.name, self.size])
        return {"peak_tensor_bytes": self.peak * self.units, "make_seconds": self.seconds}

    def measure(self, limit):
        self.machine.now += self.seconds * self.units
        self.machine.diary.append((self.name, self.size))
        return {"pass": self.seconds * self.units}

    def close(self):
        self.machine.open -= 1


def series(name, sizes, order, seconds, peak=lambda n: 1000.0, units=10, flexible=None):
    flexible = order > 0 if flexible is None else flexible
    return Series(
        "model", name, sizes, order, units, flexible,
        lambda size, units: (name, size, units, seconds(size), peak(size)),
    )  # fmt: skip


def schedule(machine, all_series, minutes=10, repetitions=5, **options):
    made = Schedule(
        all_series,
        Budget(60 * minutes, machine.clock),
        repetitions,
        start=machine.start,
        memory=lambda: machine.memory,
        say=lambda line: None,
        **options,
    )
    made.run()
    assert machine.open == 0, "every process is ended"
    return made


def test_points_begin_from_small_to_large_and_then_take_turns():
    machine = Machine()
    one = series("sam", (1024, 4096), 0.0, lambda n: 0.001)
    two = series("ntm", (1024, 4096), 1.0, lambda n: n * 1e-6)
    found = schedule(machine, [one, two], repetitions=3)
    turn = [("sam", 1024), ("sam", 4096), ("ntm", 1024), ("ntm", 4096)]  # what is cheap first
    assert machine.diary == 3 * turn
    assert not found.skipped
    by_key = {(m.name, m.size): m for m in found.measured}
    assert by_key["ntm", 4096].times["step"].median == pytest.approx(4096e-6)
    assert len(by_key["sam", 1024].times["step"].values) == 3
    assert by_key["sam", 1024].figures == {"peak_tensor_bytes": 10_000.0}


def test_what_would_overrun_the_budget_is_left_out_with_its_prediction():
    machine = Machine()
    dense = series("ntm", (1, 4, 16, 64, 256), 1.0, lambda n: 0.1 * n, flexible=False)
    found = schedule(machine, [dense], minutes=5, repetitions=50)
    assert [m.size for m in found.measured] == [1, 4, 16]  # 64 would take 64 s, five times
    assert [s.size for s in found.skipped] == [64, 256]
    assert found.skipped[-1].predicted_seconds == pytest.approx(25.6)
    assert "would take" in found.skipped[0].reason
    assert machine.now <= 5 * 60


def test_the_budget_ends_the_turns():
    machine = Machine()
    found = schedule(
        machine, [series("sam", (1,), 0.0, lambda n: 0.1)], minutes=0.5, repetitions=10**4
    )
    assert 25 < machine.now <= 30
    assert len(found.measured[0].times["step"].values) > 20


def test_steps_are_cut_down_where_all_would_not_fit_and_the_result_says_so():
    machine = Machine()
    dense = series("ntm", (1, 10), 1.0, lambda n: 0.06 * n, units=20)
    found = schedule(machine, [dense], minutes=10, repetitions=2)
    # Few at first, when nothing is known. Then a pass may take 0.5 % of 10 minutes: 3 s.
    assert [(m.size, m.steps) for m in found.measured] == [(1, 10), (10, 5)]
    assert found.measured[1].times["step"].median == pytest.approx(0.6)


def test_what_would_not_fit_into_memory_is_left_out():
    machine = Machine(memory=8 * GIB)
    dense = series("dnc", (1, 2, 4, 8), 2.0, lambda n: 1e-3, peak=lambda n: n**2 * GIB / 8)
    found = schedule(machine, [dense])
    # 3 steps of 2 GiB, times what a process takes beyond its tensors, are more than 80 % of 8.
    assert [m.size for m in found.measured] == [1, 2]
    assert found.measured[1].steps == 9  # of 10: 0.5 GiB each
    assert found.skipped[0].reason.startswith("needs 8.09 GiB of memory, 8 GiB are available")
    assert found.skipped[0].predicted_bytes == pytest.approx(6 * GIB)


def test_a_point_that_fails_is_said_and_the_others_go_on():
    machine = Machine()
    machine.fails = {("sam", 4): "its process ended with code -9"}
    found = schedule(machine, [series("sam", (1, 4, 16), 0.0, lambda n: 0.001)])
    assert [m.size for m in found.measured] == [1, 16]
    assert [(s.size, s.reason) for s in found.skipped] == [(4, "its process ended with code -9")]
