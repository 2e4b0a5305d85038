import os
import time

import pytest

from sparsemem.bench.workers import Made, Worker, WorkerError


class Fine:
    def make(self):
        return Made({"pid": float(os.getpid())}, {"nap": lambda: time.sleep(0.01)})


class Broken:
    def make(self):
        raise ValueError("no such thing\nmore")


class Dies:
    def make(self):
        os._exit(3)


class Sleeps:
    def make(self):
        time.sleep(60)


def test_a_worker_is_a_process_of_its_own_that_measures_when_asked():
    worker = Worker(Fine())
    figures = worker.made(60.0)
    assert figures["pid"] != os.getpid()
    assert worker.measure(60.0)["nap"] >= 0.01
    worker.close()


@pytest.mark.parametrize(
    ("point", "message"),
    [(Broken(), "^ValueError: no such thing$"), (Dies(), "its process ended with code 3")],
)
def test_a_worker_that_fails_says_why(point, message):
    worker = Worker(point)
    with pytest.raises(WorkerError, match=message):
        worker.made(60.0)
    worker.close()


def test_a_worker_that_takes_too_long_is_given_up():
    worker = Worker(Sleeps())
    start = time.perf_counter()
    with pytest.raises(WorkerError, match="took longer than the 0 s that were left"):
        worker.made(0.1)
    worker.close()
    assert time.perf_counter() - start < 30
