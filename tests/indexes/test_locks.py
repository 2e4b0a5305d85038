import threading
import time

import pytest

from sparsemem.indexes.locks import ReadWriteLock

PAUSE = 0.05  # seconds in which a thread that could go on would have


def start(function) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_readers_are_together_and_a_writer_is_alone():
    lock, inside = ReadWriteLock(), []
    together = threading.Barrier(2, timeout=5)

    def read():
        with lock.read():
            together.wait()  # passes only when both are inside
            inside.append("reader")

    def write():
        with lock.write():
            inside.append("writer")

    readers = [start(read), start(read)]
    for thread in readers:
        thread.join(5)
    with lock.read():
        writer = start(write)
        time.sleep(PAUSE)
        assert inside == ["reader", "reader"]
    writer.join(5)
    assert inside == ["reader", "reader", "writer"]


def test_a_waiting_writer_goes_before_new_readers():
    lock, order = ReadWriteLock(), []

    def write():
        with lock.write():
            order.append("writer")

    def read():
        with lock.read():
            order.append("reader")

    with lock.read():
        writer = start(write)
        time.sleep(PAUSE)
        reader = start(read)
        time.sleep(PAUSE)
        assert order == []
        with lock.read():  # who is inside already may go on, or nobody ever would
            pass
    writer.join(5)
    reader.join(5)
    assert order == ["writer", "reader"]


def test_taken_again_by_the_same_thread():
    lock = ReadWriteLock()
    with lock.write(), lock.write(), lock.read():
        assert lock.is_writing()
    assert not lock.is_writing()
    done = start(lambda: lock.write().__enter__())
    done.join(5)
    assert not done.is_alive()  # it was given back as often as it was taken


def test_a_reader_that_starts_to_write_is_refused():
    lock = ReadWriteLock()
    with (
        lock.read(),
        pytest.raises(RuntimeError, match="a thread that reads cannot start to write"),
        lock.write(),
    ):
        pass
    with lock.write():
        pass


def test_given_back_after_an_error():
    lock = ReadWriteLock()
    for way in (lock.read, lock.write):
        with pytest.raises(KeyError), way():
            raise KeyError
    with lock.write():
        assert lock.is_writing()


def test_a_reader_gets_in_between_two_writes_of_one_thread():
    lock, order = ReadWriteLock(), []

    def read():
        with lock.read():
            order.append("reader")

    with lock.write():
        reader = start(read)
        while not lock._parked:
            time.sleep(0.001)
    for _ in range(3):
        with lock.write():
            order.append("writer")
    reader.join(5)
    assert order == ["reader", "writer", "writer", "writer"]


def test_many_threads_come_and_go():
    lock, inside, ended = ReadWriteLock(), [0, 0], []

    def work(seed):
        for number in range(200):
            if (number + seed) % 3:
                with lock.read():
                    inside[0] += 1
                    assert inside[1] == 0
                    inside[0] -= 1
            else:
                with lock.write():
                    inside[1] += 1
                    assert inside[1] == 1
                    inside[1] -= 1
        ended.append(seed)

    threads = [start(lambda seed=seed: work(seed)) for seed in range(6)]
    for thread in threads:
        thread.join(30)
    assert sorted(ended) == list(range(6))
    assert (lock._parked, lock._owed, lock._waiting, lock._readers) == (0, 0, 0, {})
