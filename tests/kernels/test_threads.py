import threading
import time

import pytest
import torch

from sparsemem.kernels.threads import WORK, at_once, in_parts, shares, use_threads


def parts_of(threads, batch_size, work):
    """Which elements went together, and in which thread."""
    parts = []
    torch.set_num_threads(threads)
    try:
        in_parts(
            lambda begin, end: parts.append((begin, end, threading.current_thread().name)),
            batch_size,
            work,
        )
    finally:
        torch.set_num_threads(1)
    return sorted(parts)


@pytest.mark.parametrize(
    ("threads", "batch_size", "work", "bounds"),
    [
        (1, 8, 100 * WORK, [(0, 8)]),
        (2, 8, WORK, [(0, 8)]),
        (2, 8, 2 * WORK, [(0, 4), (4, 8)]),
        (3, 8, 100 * WORK, [(0, 2), (2, 5), (5, 8)]),
        (4, 1, 100 * WORK, [(0, 1)]),
    ],
)
def test_every_element_once_in_as_many_parts_as_pay(threads, batch_size, work, bounds):
    parts = parts_of(threads, batch_size, work)
    assert [part[:2] for part in parts] == bounds
    assert parts[0][2] == threading.current_thread().name


def test_kernels_may_have_threads_of_their_own():
    use_threads(2)
    assert shares(8, 100 * WORK) == [0, 4, 8]
    use_threads(None)
    assert shares(8, 100 * WORK) == [0, 8]


def test_an_error_in_a_part_is_raised():
    def fail(begin, end):
        if begin:
            raise OSError("part failed")

    torch.set_num_threads(2)
    with pytest.raises(OSError, match="part failed"):
        in_parts(fail, 4, 100 * WORK)


def test_each_part_s_result_in_their_order():
    assert at_once(lambda begin, end, add: begin + end + add, [(0, 2, 10), (2, 3, 20)]) == [12, 25]
    assert at_once(lambda begin: -begin, [(3,)]) == [-3]


def test_whoever_is_interrupted_leaves_no_part_at_work():
    done = []

    def run(begin):
        if not begin:
            raise KeyboardInterrupt
        time.sleep(0.05)
        done.append(begin)

    with pytest.raises(KeyboardInterrupt):
        at_once(run, [(0,), (1,)])
    assert done == [1]
