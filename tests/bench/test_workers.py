import os
import time

import pytest

from sparsemem.bench.workers import Made, Worker, WorkerError


class Fine:
    """For a while: it naps when first asked, and then its process ends."""

    def make(self):
        works = iter((lambda: time.sleep(0.01), lambda: os._exit(3)))
        return Made({"pid": float(os.getpid())}, {"nap": lambda: next(works)()})


class Broken:
    def make(self):
        raise ValueError("no such thing\nmore")


class Sleeps:
    def make(self):
        time.sleep(60)


def test_a_worker_is_a_process_of_its_own_that_measures_when_asked_until_it_dies():
    worker = Worker(Fine())
    figures = worker.made(60.0)
    assert figures["pid"] != os.getpid()
    assert worker.measure(60.0)["nap"] >= 0.01
    with pytest.raises(WorkerError, match="its process ended with code 3"):
        worker.measure(60.0)
    worker.close()


def test_a_worker_that_fails_says_why():
    worker = Worker(Broken())
    with pytest.raises(WorkerError, match=r"^ValueError: no such thing$"):
        worker.made(60.0)
    worker.close()


def test_a_worker_that_takes_too_long_is_given_up():
    worker = Worker(Sleeps())
    start = time.perf_counter()
    with pytest.raises(WorkerError, match="took longer than the 0 s that were left"):
        worker.made(0.1)
    worker.close()
    assert time.perf_counter() - start < 30
