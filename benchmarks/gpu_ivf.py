"""A part of scripts/gpu_check: a bank with an IVF index on the GPU, while its rows change.

1M clustered rows of width 64, IVF4096,Flat, min_recall 0.95, 64 queries near rows, top 8; against
the same FAISS index by itself and a gather of the rows that it finds. Then 10M rows, IVF16384,Flat,
which are only read.
"""

from __future__ import annotations

import time

import torch
from gpu_common import Figures, Options, Results, measure, options, wait
from torch import Tensor

from sparsemem import MemoryBank
from sparsemem.indexes.device_faiss import ENGINES, Engine
from sparsemem.indexes.metrics import Metric

WIDTH, TOP_K, QUERIES, FLOOR = 64, 8, 64, 0.95
LIVE = 16  # batches of queries that the index is tuned for
PATIENCE = 40.0  # seconds, for an index to be built or tuned


class Sizes:
    """How much of it."""

    def __init__(self, given: Options, rows: int = 10**6, lists: int = 4096) -> None:
        self.device, self.tiny = given.device, given.tiny
        self.rows = 4_000 if given.tiny else rows
        self.lists = 16 if given.tiny else lists
        self.clusters = 50 if given.tiny else self.lists // 2
        self.index = f"IVF{self.lists},Flat"


def main() -> None:
    """Build, read, change, read again."""
    given = options(__doc__ or "")
    results = Results(given.results, given.seconds)
    watched = Watched(Sizes(given))
    results.run("build", watched.build)
    if "error" in results.figures["build"] or watched.bank is None:
        return
    results.run("read", watched.read)
    results.run("recall", watched.recall)
    results.run("bare faiss", watched.bare)
    results.run("change 1 %", watched.change)
    results.run("read after the change", watched.read)
    results.run("recall after the change", watched.recall)
    results.run("change all", watched.drift)
    results.run("recall at last", watched.recall_at_last)
    results.run("read at last", watched.read)
    watched.bank.close()
    watched = Watched(Sizes(given, 10**7, 16384))
    results.run("10M build", watched.build)
    if "error" in results.figures["10M build"] or watched.bank is None:
        return
    results.run("10M read", watched.read)
    results.run("10M recall", watched.recall)
    results.run("10M bare faiss", watched.bare)


class Watched:
    """A bank and the rows that are in it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.device = sizes, sizes.device
        self.centers = torch.randn(sizes.clusters, WIDTH, device=self.device)
        self.bank: MemoryBank | None = None

    def clustered(self, number: int) -> Tensor:
        """Rows as learned embeddings are."""
        of = torch.randint(len(self.centers), (number,), device=self.device)
        return self.centers[of] + 0.5 * torch.randn(number, WIDTH, device=self.device)

    def near(self) -> Tensor:
        """Queries near rows."""
        assert self.bank is not None
        of = torch.randint(self.sizes.rows, (QUERIES,), device=self.device)
        rows = self.bank.keys.data[of]
        return rows + 0.1 * torch.randn_like(rows)

    def build(self) -> Figures:
        """Write all rows, and wait until the index is searched, and tuned."""
        rows = self.clustered(self.sizes.rows)
        small = {"exact_below": 1_000} if self.sizes.tiny else {}
        start = time.perf_counter()
        bank = MemoryBank(
            len(rows), WIDTH, index=self.sizes.index, min_recall=FLOOR, device=self.device, **small
        )
        bank.write(torch.arange(len(rows), device=self.device), rows)
        written = time.perf_counter() - start
        while bank.index.current is None and time.perf_counter() - start < PATIENCE:
            time.sleep(0.01)
        found = {"write_seconds": written, "build_seconds": time.perf_counter() - start}
        found["built"] = bank.index.current is not None
        self.bank = bank
        for _ in range(LIVE):
            bank.read(self.near(), TOP_K)
        self.settle()
        found["tuned_seconds"] = time.perf_counter() - start
        return found | {"on": type(bank.index.current).__name__, "stats": shown(bank)}

    def settle(self) -> None:
        """Wait for the index's upkeep to have nothing to do, or not much longer."""
        assert self.bank is not None
        before, begun = None, time.perf_counter()
        while time.perf_counter() - begun < (0.5 if self.sizes.tiny else 8):
            time.sleep(0.1 if self.sizes.tiny else 1.0)
            now = shown(self.bank)
            if now == before:
                return
            before = now

    def read(self) -> Figures:
        """Of queries near rows."""
        assert self.bank is not None
        bank, queries = self.bank, self.near()
        with torch.no_grad():
            found = measure(lambda: bank.read(queries, TOP_K), self.device)
        return found | {"stats": shown(bank)}

    def recall(self) -> Figures:
        """Of the rows that are nearest, the share that is found."""
        assert self.bank is not None
        shares = []
        for _ in range(4):
            queries = self.near()
            with torch.no_grad():
                truth = self.bank.index.exact.search(queries, TOP_K).ids
                found = self.bank.read(queries, TOP_K).ids
            same = (found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-1)
            shares.append(same.double().mean())
        return {"recall": round(float(torch.stack(shares).mean()), 5), "floor": FLOOR}

    def recall_at_last(self) -> Figures:
        """Of an index that all rows have left, while it is trained anew or afterwards.

        On a GPU the floor is held here, too: so many rows stray that they overrun the lists, and
        such an index is scanned until its lists are new. On the host it would be slower to scan,
        so that recall is low for that time: nothing there promises a floor.
        """
        found = self.recall()
        return found if self.device.type == "cuda" else found | {"floor": None}

    def change(self) -> Figures:
        """Move 1 % of the rows to elsewhere: at once they are found there, and not where they were.

        `fresh`: of the moved rows that are asked for as they now are, the share that is found.
        `stale`: of those asked for as they were, the share that is still found there.
        """
        assert self.bank is not None
        count = self.sizes.rows // 100
        ids = torch.randperm(self.sizes.rows, device=self.device)[:count]
        before, after = self.bank.keys.data[ids].clone(), self.clustered(count)
        wait(self.device)
        start = time.perf_counter()
        self.bank.write(ids, after)
        wait(self.device)
        found = {"write_ms": 1e3 * (time.perf_counter() - start), "rows": count}
        some = torch.arange(0, count, max(1, count // QUERIES), device=self.device)[:QUERIES]
        with torch.no_grad():
            there = self.bank.read(after[some], 1).ids.flatten()
            gone = self.bank.read(before[some], 1).ids.flatten()
        found["fresh"] = float((there == ids[some]).double().mean())
        found["stale"] = float((gone == ids[some]).double().mean())
        return found | {"stats": shown(self.bank)}

    def drift(self) -> Figures:
        """All rows move to other clusters, in 20 writes with reads between; then it settles."""
        assert self.bank is not None
        self.centers = torch.randn_like(self.centers)
        order = torch.randperm(self.sizes.rows, device=self.device)
        start = time.perf_counter()
        slowest = 0.0
        for ids in order.chunk(20):
            self.bank.write(ids, self.clustered(len(ids)))
            begun = time.perf_counter()
            self.bank.read(self.near(), TOP_K).ids.cpu()
            slowest = max(slowest, time.perf_counter() - begun)
        found = {"seconds_moving": time.perf_counter() - start, "slowest_read_ms": 1e3 * slowest}
        self.settle()
        return found | {"settled_seconds": time.perf_counter() - start, "stats": shown(self.bank)}

    def bare(self) -> Figures:
        """FAISS by itself at the bank's effort, on tensors where they are, and a gather."""
        assert self.bank is not None
        kind = ENGINES.get(self.device.type, Engine)
        rows = torch.nn.functional.normalize(self.bank.keys.data, dim=1)
        start = time.perf_counter()
        engine = kind(self.sizes.index, WIDTH, Metric.cosine, self.device)
        engine.train(rows[torch.randperm(len(rows), device=self.device)[: 32 * self.sizes.lists]])
        for part in rows.split(2**18):
            engine.add(part)
        build = time.perf_counter() - start
        effort = int(self.bank.stats().get("effort") or 16)
        queries, table = torch.nn.functional.normalize(self.near(), dim=1), self.bank.keys.data

        def search_and_gather() -> Tensor:
            return table[engine.search(queries, TOP_K, effort)[1]]

        found = measure(search_and_gather, self.device)
        return found | {"build_seconds": build, "effort": effort}


def shown(bank: MemoryBank) -> Figures:
    """What the bank says of its index."""
    left_out = ("num_rows", "num_live", "num_frozen", "clock", "table_bytes", "age")
    return {
        name: round(value, 4) if isinstance(value, float) else str(value)
        for name, value in bank.stats().items()
        if name not in left_out
    }


if __name__ == "__main__":
    main()
