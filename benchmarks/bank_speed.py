"""What a bank costs over bare FAISS: python benchmarks/bank_speed.py (6 minutes; 8 GiB).

1M x 64 clustered rows, IVF4096,Flat, 64 queries, top 8, one thread: a read, and a training step
(read, backward, row optimiser, index update), against FAISS's own search and a gather of the
rows that it found; exact search; and 10M x 32 rows on this machine. Writes bank_speed.json.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import faiss
import torch
import typer
from clusters import clustered
from common import Timings, interleaved, machine, recalls, seconds
from torch import Tensor

from sparsemem import MemoryBank
from sparsemem.indexes.kinds import to_faiss
from sparsemem.indexes.metrics import Metric
from sparsemem.optim import RowAdam, RowSGD

QUERIES, TOP_K, FLOOR = 64, 8, 0.95
REPETITIONS = 60


def built(rows: Tensor, index: str) -> tuple[MemoryBank, float]:
    """A bank with these rows, once its index is searched; and the seconds that took."""
    start = time.perf_counter()
    bank = MemoryBank(len(rows), rows.shape[1], index=index, min_recall=FLOOR)
    bank.write(torch.arange(len(rows)), rows)
    while bank.index.current is None:
        time.sleep(0.05)
    return bank, time.perf_counter() - start


def bare(rows: Tensor, name: str) -> Any:
    """A FAISS index as anybody would build it."""
    index = faiss.index_factory(rows.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 6, 32  # as the bank's
    vectors = to_faiss(rows, Metric.cosine)
    index.train(vectors)
    index.add(vectors)
    return index


def queries_near(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of queries, each near a row."""
    near = rows[torch.randint(len(rows), (QUERIES,), generator=generator)]
    return near + 0.1 * torch.randn(near.shape, generator=generator)


def training_step(bank: MemoryBank, optimiser: torch.optim.Optimizer, queries: Tensor) -> None:
    """Read, backward, step; the step tells the index."""
    optimiser.zero_grad()
    hit = bank.read(queries, TOP_K)
    (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum().backward()
    optimiser.step()


class Rivals:
    """A bank and a FAISS index over the same rows, and the queries that both get next."""

    def __init__(self, rows: Tensor, name: str) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(5)
        self.bank, self.build_seconds = built(rows, name)
        self.plain = bare(rows, name)
        for _ in range(8):  # live queries, which the index is then tuned for
            self.bank.read(queries_near(rows, self.generator), TOP_K)
        time.sleep(5)
        self.renew()

    def renew(self) -> None:
        """Queries that neither has seen; both look equally hard."""
        self.plain.nprobe = self.bank.stats()["effort"]
        self.queries = queries_near(self.rows, self.generator)

    def theirs(self) -> Any:
        """What FAISS finds."""
        return self.plain.search(to_faiss(self.queries, Metric.cosine), TOP_K)[1]

    def measured(self, repetitions: int, **works: Callable[[], object]) -> Timings:
        """Times in turns with FAISS's search and a gather of the rows that it found."""
        gather = {"faiss_and_gather": lambda: self.rows[torch.from_numpy(self.theirs())]}
        return interleaved({"queries": self.renew, **gather, **works}, repetitions)

    def recalls(self) -> dict[str, float]:
        """Of the bank and of FAISS, on the next queries, against exact search."""
        self.renew()
        with torch.no_grad():
            truth = self.bank.index.exact.search(self.queries, TOP_K).ids.numpy()
            found = self.bank.read(self.queries, TOP_K).ids.numpy()
        return {
            "recall_of_read": statistics.mean(recalls(found, truth)),
            "recall_of_faiss": statistics.mean(recalls(self.theirs(), truth)),
        }


def one_million() -> dict[str, Any]:
    """Read and training step against bare FAISS and against exact search."""
    rivals = Rivals(clustered(1_000_000, 64), "IVF4096,Flat")
    bank = rivals.bank

    def read() -> object:
        return bank.read(rivals.queries, TOP_K)

    reads = rivals.measured(REPETITIONS, read=read)
    accuracy = rivals.recalls()
    scans = interleaved(
        {"exact": lambda: bank.index.exact.search(rivals.queries, TOP_K), "read": read}, 7
    )
    result: dict[str, Any] = {"build_seconds": rivals.build_seconds, **accuracy}
    result["milliseconds"] = {
        name: times.median(name) * 1e3 for times in (scans, reads) for name in times
    }
    result["read_to_faiss_and_gather"] = reads.ratio("read", "faiss_and_gather")
    result["exact_to_read"] = scans.ratio("exact", "read")
    adam = RowAdam([bank.keys], lr=1e-4)
    for name, optimiser in {
        "step_sgd": RowSGD([bank.keys], lr=1e-3),
        "step_adam_first": adam,  # the rows' state has no pages yet: a fault each
        "step_adam": adam,
    }.items():
        for state in optimiser.state[bank.keys].values():
            state.zero_()
        step = partial(training_step, bank, optimiser)
        times = rivals.measured(2 * REPETITIONS, step=lambda step=step: step(rivals.queries))
        result["milliseconds"][name] = times.median("step") * 1e3
        result[f"{name}_to_faiss_and_gather"] = times.ratio("step", "faiss_and_gather")
    result["stats"] = bank.stats()
    bank.close()
    return result


def ten_million() -> dict[str, Any]:
    """10M x 32 rows: time to build, to read, to train; peak memory."""
    generator = torch.Generator().manual_seed(6)
    rows = clustered(10_000_000, 32)
    bank, build_seconds = built(rows, "IVF16384,Flat")
    queries = [queries_near(rows, generator) for _ in range(40)]
    del rows
    turns = iter(queries * 10)
    for _ in range(8):
        bank.read(next(turns), TOP_K)
    time.sleep(20)
    sgd = RowSGD([bank.keys], lr=1e-3)
    times = interleaved(
        {
            "read": lambda: bank.read(next(turns), TOP_K),
            "step_sgd": lambda: training_step(bank, sgd, next(turns)),
        },
        REPETITIONS,
    )
    exact_seconds = seconds(lambda: bank.index.exact.search(queries[0], TOP_K))
    truth = bank.index.exact.search(queries[0], TOP_K).ids.numpy()
    found = bank.read(queries[0], TOP_K).ids.numpy()
    result = {
        "index": "IVF16384,Flat",
        "build_seconds": build_seconds,
        "recall_of_read": statistics.mean(recalls(found, truth)),
        "milliseconds": {name: times.median(name) * 1e3 for name in times},
        "exact_milliseconds": exact_seconds * 1e3,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "rows_gib": bank.keys.nbytes / 2**30,
        "stats": bank.stats(),
    }
    bank.close()
    return result


PARTS = {"1M x 64": one_million, "10M x 32": ten_million}


def main(part: Annotated[str | None, typer.Option(help="One part only, as JSON.")] = None) -> None:
    """Measure each part in a process of its own, and write the JSON beside this file."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if part is not None:
        print(json.dumps(PARTS[part]()))
        return
    result: dict[str, Any] = {
        "machine": machine(),
        "setting": f"{QUERIES} queries, top {TOP_K}, min_recall {FLOOR}, cosine, float32",
    }
    for name in PARTS:
        command = [sys.executable, __file__, "--part", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result[name] = json.loads(output.splitlines()[-1])
    text = json.dumps(result, indent=2)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
