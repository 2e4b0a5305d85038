"""Two threads read while a third writes and trains, and the index is rebuilt beside them.

SPARSEMEM_SOAK_SECONDS=600 makes it ten minutes.
"""

import os
import threading
import time

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.optim import RowSGD

N, W, V, K = 20_000, 16, 4, 8
SECONDS = float(os.environ.get("SPARSEMEM_SOAK_SECONDS", "60"))


class Soak:
    """A bank whose rows say whether they are whole: all W entries are one number, and the value's
    V entries are twice that number."""

    def __init__(self, seconds: float) -> None:
        self.bank = MemoryBank(
            N,
            W,
            V,
            index="IVF64,Flat",
            metric="l2",
            min_recall=0.9,
            exact_below=100,
            buffer_rows=200,
        )
        # Before the clock starts: torch imports much more with the first optimiser.
        self.optimiser = RowSGD([self.bank.keys, self.bank.values], lr=1.0)
        self.end = time.monotonic() + seconds
        self.errors: list[BaseException] = []
        self.reads = self.writes = self.rebuilds = 0

    def running(self) -> bool:
        return time.monotonic() < self.end and not self.errors

    def write_rows(self, ids: torch.Tensor, generator: torch.Generator) -> None:
        number = torch.randint(1, 1_000_000, (len(ids), 1), generator=generator).float()
        self.bank.write(ids, number.expand(-1, W), 2 * number.expand(-1, V))

    def reader(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while self.running():
            queries = torch.rand(16, 1, generator=generator).mul(1_000_000).expand(-1, W)
            with torch.no_grad():
                hit = self.bank.read(queries, K)
            there = hit.ids >= 0
            first = hit.rows[..., :1]
            assert torch.equal(hit.rows, first.expand_as(hit.rows)), "a torn key"
            assert torch.equal(hit.values, (2 * first).expand_as(hit.values)), "a torn value"
            assert (first.squeeze(-1)[there] > 0).all(), "a row that is not there"
            self.reads += 1

    def writer(self) -> None:
        generator = torch.Generator().manual_seed(3)
        while self.running():
            ids = torch.randperm(N, generator=generator)[:64]
            self.write_rows(ids, generator)
            self.bank.remove(ids[:8])
            # A step that adds 1 to keys and 2 to values, so that rows stay whole.
            some = ids[8:40]
            self.optimiser.zero_grad()
            for table, by in ((self.bank.keys, 1.0), (self.bank.values, 2.0)):
                gradient = table.new_full((len(some), table.shape[1]), -by)
                table.grad = torch.sparse_coo_tensor(
                    some.unsqueeze(0), gradient, table.shape, check_invariants=True
                )
            with self.bank.table.lock.write():  # keys and values in one
                self.optimiser.step()
            self.writes += 1

    def rebuilder(self) -> None:
        while self.running():
            self.bank.index.rebuild()
            self.rebuilds += 1

    def guarded(self, function, *arguments) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            self.errors.append(error)

    def run(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.write_rows(torch.arange(N), generator)
        work = [(self.reader, 1), (self.reader, 2), (self.writer,), (self.rebuilder,)]
        threads = [threading.Thread(target=self.guarded, args=part, daemon=True) for part in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.end - time.monotonic()) + 60)
            assert not thread.is_alive(), "a deadlock"


def soak(seconds: float) -> Soak:
    torch.set_num_threads(1)
    run = Soak(seconds)
    run.run()
    if run.errors:
        raise run.errors[0]
    stats = run.bank.stats()
    run.bank.close()
    assert stats["error"] is None
    assert min(run.reads, run.writes, run.rebuilds) >= 1
    return run


def test_reading_writing_and_rebuilding_at_once():
    soak(3.0)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 180)
def test_for_a_long_time():
    run = soak(SECONDS)
    print(f"{run.reads} reads, {run.writes} writes, {run.rebuilds} rebuilds")
    queries = torch.rand(64, 1).mul(1_000_000).expand(-1, W)
    found = run.bank.read(queries, K)
    exact = run.bank.index.exact.search(queries, K)
    assert (found.ids == exact.ids).float().mean() > 0.85
