import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from sparsemem.indexes import worker
from sparsemem.indexes.worker import Rest, Worker, stand_back


class Counter:
    def __init__(self):
        self.called, self.times = threading.Event(), 0

    def maintain(self):
        self.times += 1
        self.called.set()


def test_called_when_woken_and_not_after_it_stopped():
    counter = Counter()
    worker = Worker(counter)
    worker.wake()
    assert counter.called.wait(5)
    worker.stop()
    assert worker.stopped
    worker.wake()
    assert counter.times == 1


def test_stop_waits_for_what_it_started():
    worker, ended = Worker(Counter()), []

    def work():
        while not worker.stopped:
            time.sleep(0.005)
        ended.append(True)

    worker.start(work)
    worker.stop()
    assert ended == [True]


def test_some_stop_while_others_start():
    counters, errors = [Counter() for _ in range(4)], []

    def start_and_stop(counter):
        try:
            for _ in range(60):
                Worker(counter).stop()
        except RuntimeError as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=start_and_stop, args=[one]) for one in counters]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_a_rest_is_so_many_times_as_long_as_the_work(monkeypatch):
    now = 100.0
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now))
    rest = Rest()
    assert rest.is_over(9)
    with rest.after():
        now += 3
    now += 6
    assert rest.is_over(2)
    assert not rest.is_over(9)
    rest.cut_short()
    assert rest.is_over(9)
    with rest.after():
        now += 1
        rest.cut_short()
        now += 2
    assert rest.is_over(9)


def test_does_not_keep_its_object_alive():
    counter = Counter()
    worker = Worker(counter)
    worker.wake()
    assert counter.called.wait(5)
    reference = weakref.ref(counter)
    del counter
    for _ in range(100):
        gc.collect()
        if reference() is None:
            break
        time.sleep(0.01)
    assert reference() is None
    worker._thread.join(5)
    assert not worker._thread.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is the whole process's")
def test_stands_back_alone():
    before, seen = os.getpriority(os.PRIO_PROCESS, 0), []

    def work():
        stand_back(3)
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3 if before <= 3 else before]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_the_interpreter_ends_well_in_the_middle_of_a_build(repository):
    code = (
        "import torch\n"
        "from sparsemem.indexes.factory import make_index\n"
        "from sparsemem.indexes.metrics import Metric\n"
        "from sparsemem.indexes.table import RowTable\n"
        "table = RowTable(torch.randn(50_000, 8), torch.ones(50_000, dtype=torch.bool))\n"
        "index = make_index('IVF256,Flat', table, Metric.ip, exact_below=1)\n"
        "while index.next is None and index.current is None: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
