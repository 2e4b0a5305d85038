import io

import pytest

from sparsemem.distributed import desk as desks
from sparsemem.distributed.desk import Desk, Reporter, Shown, Word, show

# A StringIO is no TextIO to the checker.
pytestmark = pytest.mark.usefixtures("plain_errors")

VALUES = {"loss": 0.5, "metric": 2.0, "touched": 3.0, "level": 4.0, "seconds": 6.0}


class At:
    """A desk in this process, whose answers come when they are let."""

    def __init__(self):
        self.desk, self.is_late = Desk(), False

    def leave(self, words):
        answer = self.desk.leave(words)
        return lambda patience: None if self.is_late and not patience else answer


def test_what_is_left_is_fetched_once_and_in_order():
    at = At()
    reporter = Reporter(at.leave, step=10)
    reporter.say("hello")
    reporter.log(11, VALUES)
    assert at.desk.fetch() == [Word("say", ("hello",)), Word("log", (11, VALUES))]
    assert at.desk.fetch() == []


def test_steps_are_told_now_and_then(monkeypatch):
    at, now = At(), [0.0]
    monkeypatch.setattr(desks.time, "monotonic", lambda: now[0])
    reporter = Reporter(at.leave, step=10)
    for _ in range(5):
        reporter.step(VALUES)
        now[0] += desks.EVERY_SECONDS / 2
    assert [word.arguments[0] for word in at.desk.fetch()] == [11, 13, 15]


def test_a_reporter_hears_that_the_team_is_to_stop(monkeypatch):
    at = At()
    reporter = Reporter(at.leave, step=0)
    reporter.say("one")
    at.desk.stop()
    reporter.say("two")  # hears the answer to the first
    assert reporter.stop.number is None
    reporter.say("three")
    assert reporter.stop.number is not None


def test_a_reporter_waits_for_its_last_word():
    at = At()
    at.is_late = True
    reporter = Reporter(at.leave, step=0)
    at.desk.stop()
    reporter.say("one")
    reporter.say("two")
    assert reporter.stop.number is None
    reporter.close()
    assert reporter.stop.number is not None


def test_starts_are_counted():
    desk = Desk()
    assert [desk.begin() for _ in range(3)] == [0, 1, 2]


def test_words_are_shown_as_those_of_a_run_without_a_desk():
    stream = io.StringIO()
    progress = Shown(total=30, start=0, metric_name="wrong bits", stream=stream)
    words = [Word("say", ("hello",)), Word("at", (11, VALUES)), Word("log", (12, VALUES))]
    show(words, progress)
    progress.close()
    line = "step 12/30: loss 0.5000, wrong bits 2, touched 3, level 4, 6 s"
    assert stream.getvalue().splitlines() == ["hello", line]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_goes_back_with_the_team(monkeypatch):
    monkeypatch.setattr("sparsemem.training.progress._columns", lambda terminal: 80)
    progress = Shown(total=30, start=0, metric_name="wrong bits", stream=Terminal())
    show([Word("at", (12, VALUES)), Word("at", (10, VALUES))], progress)
    assert progress._bar.n == 10
    progress.close()
