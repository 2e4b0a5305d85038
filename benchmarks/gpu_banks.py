"""A part of scripts/gpu_check: exact reads of banks, against what must move, FAISS, and torch.

Rows of width 64, top 8, cosine. The limit of a read is the time of moving all rows, and a mark of
each, once at the bandwidth of a copy. Beside it stands what its products take, each number of a row
with each query once, at the speed of torch's products of bfloat16 matrices: whichever is longer
bounds the read. A captured search is one without the host's part. A training step is a read, its
backward pass, and the row optimiser's step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_common import (
    CUT_OFF,
    Figures,
    Options,
    Results,
    copy_bandwidth,
    measure,
    options,
    peak_bytes,
)
from gpu_problems import NEEDS_GPU, NO_TIME
from torch import Tensor

from sparsemem import MemoryBank, RowAdam, RowSGD
from sparsemem.indexes.device_scan import device_scan
from sparsemem.indexes.knn_gpu import knn_gpu
from sparsemem.indexes.metrics import Metric

WIDTH, TOP_K = 64, 8
AT_ONCE = 2**20  # rows that are made, or multiplied, at a time
GOAL = 1.5  # a read's time by its limit
PRODUCT = 8192  # rows and columns of the matrices whose product gives the speed of products


class Size(NamedTuple):
    """A bank."""

    name: str
    rows: int
    dtype: torch.dtype


class Speed(NamedTuple):
    """What the device has shown that it can do, each a second."""

    bytes: float | None  # moved
    operations: float | None  # of products of bfloat16 matrices


SIZES = (
    Size("1M float32", 10**6, torch.float32),
    Size("10M float32", 10**7, torch.float32),
    Size("100M bfloat16", 10**8, torch.bfloat16),  # and 51 GB of Adam's state
)


def main() -> None:
    """Bank by bank."""
    given = options(__doc__ or "")
    results = Results(given.results, given.seconds)
    results.run("copy", lambda: {"bytes_a_second": copy_bandwidth(given.device, given.tiny)})
    results.run("product", lambda: product_speed(given))
    speed = Speed(
        results.figures["copy"].get("bytes_a_second"),
        results.figures["product"].get("operations_a_second"),
    )
    for size in SIZES:
        if given.tiny:
            size = size._replace(rows=2_000)
        results.run(size.name, lambda size=size: Measured(given, size, speed).figures(results))


class Measured:
    """A bank full of random rows, and what it is compared with."""

    def __init__(self, given: Options, size: Size, speed: Speed) -> None:
        self.given, self.size, self.device, self.speed = given, size, given.device, speed
        self.bank = filled(size, given.device)
        self.bytes = self.bank.keys.nbytes + size.rows
        self.limit = None if speed.bytes is None else 1e3 * self.bytes / speed.bytes

    def figures(self, results: Results) -> Figures:
        """Reads of 16, 64 and 256 queries, then training; kept as they come."""
        found: Figures = {"rows": self.size.rows, "dtype": str(self.size.dtype)}
        found["bytes"], found["limit_ms"] = self.bytes, self.limit
        works: dict[str, Callable[[], Figures]] = {}
        for number in (16, 64, 256):
            queries = self.queries(number)
            works[f"{number} agreement"] = partial(self.agreement, queries)
            works[f"{number} read"] = partial(self.read, queries)
            works[f"{number} search"] = partial(self.search, queries)
            if number > 16:
                works[f"{number} faiss"] = partial(self.faiss, queries)
                works[f"{number} torch"] = partial(self.torch, queries)
        for number in (16, 64, 256):
            works[f"{number} captured search"] = partial(self.captured, self.queries(number))
        for kind in (RowSGD, RowAdam):
            works[f"64 step {kind.__name__}"] = partial(self.step, kind, self.queries(64))
        for name, work in works.items():
            if results.seconds_left < 3:
                found[name] = {"skipped": NO_TIME}
                continue
            try:
                found[name] = work()
            except (RuntimeError, ImportError, AttributeError, TypeError) as error:
                if "CUDA error" in str(error):
                    raise
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            print(name, found[name], flush=True)
            results.record(self.size.name, found | {"stopped": CUT_OFF})  # until all is there
        found["peak_bytes"] = peak_bytes(self.device)
        return found

    def queries(self, number: int) -> Tensor:
        """Random ones; the rows are none nearer than any other."""
        return torch.randn(number, WIDTH, device=self.device)

    def read(self, queries: Tensor) -> Figures:
        """`MemoryBank.read`, without gradients."""
        with torch.no_grad():
            return self.against_limit(lambda: self.bank.read(queries, TOP_K), len(queries))

    def search(self, queries: Tensor) -> Figures:
        """The index alone."""
        with torch.no_grad():
            return self.against_limit(lambda: self.bank.index.search(queries, TOP_K), len(queries))

    def captured(self, queries: Tensor) -> Figures:
        """The scan alone, launched by the device."""
        if self.device.type != "cuda":
            return {"skipped": NEEDS_GPU}
        scan = partial(device_scan, self.bank.index.table, Metric.cosine, queries, TOP_K)
        scan()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scan()
        return self.against_limit(graph.replay, len(queries))

    def against_limit(self, work: Callable[[], object], queries: int) -> Figures:
        """Times, and their ratio to the limit."""
        found = measure(work, self.device)
        if self.limit is not None:
            found["to_limit"] = round(found["ms"] / self.limit, 2)
        if self.speed.operations is not None:
            operations = 2 * queries * self.size.rows * WIDTH
            found["products_ms"] = round(1e3 * operations / self.speed.operations, 4)
        return found

    def faiss(self, queries: Tensor) -> Figures:
        """FAISS's brute force on the GPU, on the same tensor (inner products: no norms to make)."""
        rows = self.bank.keys.data
        return self.against_limit(partial(brute_force(self.device), rows, queries), len(queries))

    def torch(self, queries: Tensor) -> Figures:
        """A product and topk of torch, in chunks."""
        rows = self.bank.keys.data
        return self.against_limit(lambda: by_torch(rows, queries, False), len(queries))

    def agreement(self, queries: Tensor) -> Figures:
        """Of the rows that torch finds in float32, the share that the bank finds."""
        truth = by_torch(self.bank.keys.data, queries, True)
        with torch.no_grad():
            found = self.bank.read(queries, TOP_K).ids
        same = (found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-1).double().mean()
        return {"found": round(float(same), 5)}

    def step(self, kind: Any, queries: Tensor) -> Figures:
        """A training step."""
        optimiser = kind([self.bank.keys], lr=1e-4)

        def step() -> None:
            optimiser.zero_grad()
            hit = self.bank.read(queries, TOP_K)
            (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum().backward()
            optimiser.step()

        return self.against_limit(step, len(queries))


def product_speed(given: Options) -> Figures:
    """Operations a second of a large product of bfloat16 matrices; to multiply and add are two."""
    size = 64 if given.tiny else PRODUCT
    left, right = torch.randn(2, size, size, device=given.device).bfloat16()
    taken = measure(lambda: left @ right, given.device, repetitions=15)
    return {"operations_a_second": 2 * size**3 / (taken["ms"] * 1e-3)}


def filled(size: Size, device: torch.device) -> MemoryBank:
    """A bank whose rows are all there, random."""
    bank = MemoryBank(size.rows, WIDTH, dtype=size.dtype, device=device)
    for start in range(0, size.rows, AT_ONCE):
        ids = torch.arange(start, min(start + AT_ONCE, size.rows), device=device)
        bank.write(ids, torch.randn(len(ids), WIDTH, device=device).to(size.dtype))
    return bank


def by_torch(rows: Tensor, queries: Tensor, exactly: bool) -> Tensor:
    """Rows of the largest cosines [Q, K], by torch; exactly: in float32 whatever the rows are."""
    scores, ids = [], []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        if exactly:
            part = torch.nn.functional.normalize(part.float(), dim=1)
        found = (queries.to(part.dtype) @ part.T).topk(TOP_K)
        scores.append(found.values.float())
        ids.append(found.indices + start)
    best = torch.cat(scores, 1).topk(TOP_K).indices
    return torch.cat(ids, 1).gather(1, best)


def brute_force(device: torch.device) -> Callable[[Tensor, Tensor], object]:
    """FAISS's exact search of a tensor where it is; it makes tables [Q, part of N] on its way."""
    if device.type == "cuda":
        return lambda rows, queries: knn_gpu(rows, queries, TOP_K, Metric.ip)
    import faiss

    return lambda rows, queries: faiss.knn(
        queries.float().numpy(), rows.float().numpy(), TOP_K, faiss.METRIC_INNER_PRODUCT
    )


if __name__ == "__main__":
    main()
