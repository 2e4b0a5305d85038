"""What sharding costs: python benchmarks/sharded_speed.py (5 minutes; 6 GiB).

A training step (read, backward, row Adam) on 1M x 64 clustered rows, 256 queries, top 8, IVF:
one process with IVF4096, and S Ray actors on the same cores with IVF(4096 / S) each, or, "fine",
with IVF4096 each. Writes sharded_speed.json: times of a step, processor time of all processes
together and of the caller (which a busy machine does not stretch), bytes on the wire against
`wire_bytes`, and a model of the time over shards; and draws that to 64 nodes and 10^9 rows in
docs/sharded.png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from clusters import clustered
from common import machine, recalls
from torch import Tensor

from sparsemem import MemoryBank
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.traffic import wire_bytes
from sparsemem.optim import RowAdam

ROWS, WIDTH, QUERIES, TOP_K, LISTS, SEED = 1_000_000, 64, 256, 8, 4096, 5
PARTS = (
    "one",
    "1",
    "2",
    "4",
    "2 fine",
    "4 fine",
)  # fine: as many lists a shard
PICTURE = Path(__file__).parent.parent / "docs" / "sharded.png"
TICK = os.sysconf("SC_CLK_TCK")
# Assumed of a cluster, not measured: a network of 10 Gbit/s and 0.1 ms there and back.
BANDWIDTH, LATENCY = 1.25e9, 1e-4

Bank = MemoryBank | ShardedBank


def queries_near(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of queries, each near a row."""
    near = rows[torch.randint(len(rows), (QUERIES,), generator=generator)]
    return near + 0.1 * torch.randn(near.shape, generator=generator)


def training_step(bank: Bank, optimiser: RowAdam, queries: Tensor) -> Tensor:
    """Read, backward, step; the ids that were read."""
    optimiser.zero_grad()
    hit = bank.read(queries, TOP_K)
    (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum().backward()
    optimiser.step()
    return hit.ids


def processor_seconds(processes: Sequence[int]) -> np.ndarray:
    """Seconds that each process has computed so far, all of its threads."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in processes]
    return np.array([int(field[11]) + int(field[12]) for field in fields]) / TICK


def measured(
    bank: Bank, rows: Tensor, processes: Sequence[int], steps: int, is_ready: Callable[[], bool]
) -> dict[str, Any]:
    """Fill a bank, wait for its lists, and time steps. The first of the processes is this one."""
    generator, start = torch.Generator().manual_seed(SEED), time.perf_counter()
    bank.write(torch.arange(len(rows)), rows)
    while not is_ready():
        time.sleep(0.2)
    result: dict[str, Any] = {"build_seconds": time.perf_counter() - start}
    optimiser = RowAdam([bank.keys], lr=1e-4)
    for _ in range(8):  # live queries, which the lists are then tuned for
        training_step(bank, optimiser, queries_near(rows, generator))
    time.sleep(5)
    times, reads, distinct, computed = [], [], [], processor_seconds(processes)
    for _ in range(steps):
        queries = queries_near(rows, generator)
        begin = time.perf_counter()
        ids = training_step(bank, optimiser, queries)
        times.append(time.perf_counter() - begin)
        distinct.append(len(torch.unique(ids)))
    computed = processor_seconds(processes) - computed
    with torch.no_grad():
        for _ in range(steps):
            begin = time.perf_counter()
            bank.read(queries_near(rows, generator), TOP_K)
            reads.append(time.perf_counter() - begin)
    return result | {
        "step_milliseconds": statistics.median(times) * 1e3,
        "fastest_step_milliseconds": min(times) * 1e3,
        "read_milliseconds": statistics.median(reads) * 1e3,
        "processor_milliseconds_a_step": float(computed.sum()) / steps * 1e3,
        "caller_milliseconds_a_step": float(computed[0]) / steps * 1e3,
        "distinct_rows": statistics.mean(distinct),
    }


def recall_of(bank: Bank, rows: Tensor) -> float:
    """Against exact search in the rows as they were written: steps of 1e-4 move them little."""
    queries = queries_near(rows, torch.Generator().manual_seed(7))
    exact = MemoryBank(len(rows), WIDTH)
    exact.write(torch.arange(len(rows)), rows)
    with torch.no_grad():
        return statistics.mean(
            recalls(bank.read(queries, TOP_K).ids.numpy(), exact.read(queries, TOP_K).ids.numpy())
        )


def one_process(steps: int) -> dict[str, Any]:
    """A `MemoryBank`."""
    rows = clustered(ROWS, WIDTH)
    bank = MemoryBank(ROWS, WIDTH, index=f"IVF{LISTS},Flat")
    result = measured(bank, rows, [os.getpid()], steps, lambda: bank.index.current is not None)
    result |= {"recall": recall_of(bank, rows), "effort": bank.stats()["effort"]}
    bank.close()
    return result


def over_shards(num_shards: int, lists: int, steps: int) -> dict[str, Any]:
    """A `ShardedBank` over Ray actors of one thread each."""
    import ray

    from sparsemem.distributed.rayshards import RayShards

    rows, folder = clustered(ROWS, WIDTH), tempfile.mkdtemp()
    path = ShardedBank.create(
        Path(folder, "bank"),
        ROWS,
        WIDTH,
        num_shards=num_shards,
        index=f"IVF{lists},Flat",
    )
    ray.init(address="local", num_cpus=num_shards, include_dashboard=False, log_to_driver=False)
    try:
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        shards = RayShards.start(path, timeout=600.0, runtime_env=environment)  # a busy machine
        bank = ShardedBank(path, shards)
        processes = [os.getpid(), *actors()]

        def is_ready() -> bool:
            return all(shard["exact"] is False for shard in bank.stats()["shards"])

        result = measured(bank, rows, processes, steps, is_ready)
        shards.traffic.sent = shards.traffic.received = 0
        ids = training_step(bank, RowAdam([bank.keys], lr=1e-4), queries_near(rows, generator()))
        sent, received = shards.traffic.sent, shards.traffic.received
        distinct = len(torch.unique(ids))
        predicted = wire_bytes(num_shards, QUERIES, TOP_K, WIDTH, distinct=distinct)
        stats = bank.stats()["shards"]
        result |= {"recall": recall_of(bank, rows), "effort": [one["effort"] for one in stats]}
        return result | {
            "bytes": {"sent": sent, "received": received},
            "predicted_bytes": predicted._asdict(),
        }
    finally:
        ray.shutdown()


def generator() -> torch.Generator:
    """Of queries beside the measured ones."""
    return torch.Generator().manual_seed(11)


def actors() -> list[int]:
    """The processes of this process's shards."""
    found, parents = [], {os.getpid()}
    status = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        status[int(stat.parent.name)] = (name, int(rest.split()[1]))
    for _ in range(4):  # generations: the node's processes, their workers
        parents |= {pid for pid, (_, parent) in status.items() if parent in parents}
    for pid in parents:
        if "ShardActor" in status.get(pid, ("", 0))[0]:
            found.append(pid)
    return found


def nonnegative(columns: Any, values: Any) -> list[float]:
    """The coefficients >= 0 that fit values best."""
    best: tuple[float, list[float]] = (np.inf, [])
    for chosen in range(1, 2 ** columns.shape[1]):  # which of them are not 0
        used = [place for place in range(columns.shape[1]) if chosen >> place & 1]
        solved, *_ = np.linalg.lstsq(columns[:, used], values, rcond=None)
        error = float(np.square(columns[:, used] @ solved - values).sum())
        if solved.min() >= 0 and error < best[0]:
            full = [0.0] * columns.shape[1]
            for place, value in zip(used, solved, strict=True):
                full[place] = float(value)
            best = error, full
    return best[1]


class Model:
    """Seconds of a step over S shards of N / S rows each, a node each, fitted to measurements.

    caller's + shard's + wire: `own` is the caller's work that does not depend on S; `call` its
    work for each shard; `request` that of a shard whatever it holds, and `search` what depends on
    its rows, which all shards do at once: lists and centroids that a query looks at grow with the
    square root of them.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        names = {1: "1", 2: "2 fine", 4: "4 fine"}  # as many lists in each shard
        counts, found = np.array(list(names)), [results[name] for name in names.values()]
        caller = np.array([one["caller_milliseconds_a_step"] for one in found]) / 1e3
        work = np.array([one["processor_milliseconds_a_step"] for one in found]) / 1e3
        ones = np.ones_like(counts)
        self.own, self.call = nonnegative(np.stack([ones, counts], 1), caller)
        of_rows = np.stack([ones, (ROWS / counts) ** 0.5], 1)
        self.request, self.search = nonnegative(of_rows, (work - caller) / counts)

    def seconds(self, num_shards: int, rows: float, is_remote: bool = True) -> float:
        """Of a step: every shard has a node, of as many rows."""
        step = wire_bytes(num_shards, QUERIES, TOP_K, WIDTH)
        wire = (step.sent + step.received) / BANDWIDTH + 2 * LATENCY if is_remote else 0.0
        shard = self.request + self.search * (rows / num_shards) ** 0.5
        return self.own + num_shards * self.call + shard + wire

    def coefficients(self) -> dict[str, float]:
        """In milliseconds."""
        return {
            "own": self.own * 1e3,
            "call": self.call * 1e3,
            "request": self.request * 1e3,
            "search_of_1M_rows": self.search * ROWS**0.5 * 1e3,
        }


def draw(model: Model, is_quiet: bool, path: Path) -> None:
    """A step's time over nodes, for several numbers of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nodes = [1, 2, 4, 8, 16, 32, 64]
    figure, axes = plt.subplots(figsize=(7, 5.2))
    for rows, label in ((1e6, "$10^6$"), (1e7, "$10^7$"), (1e8, "$10^8$"), (1e9, "$10^9$")):
        times = [model.seconds(count, rows) * 1e3 for count in nodes]
        axes.plot(nodes, times, marker="o", label=f"{label} rows")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(nodes, [str(count) for count in nodes])
    axes.set_xlabel("nodes, one shard each")
    axes.set_ylabel("milliseconds a training step")
    axes.legend()
    axes.grid(alpha=0.3)
    state = "" if is_quiet else " busy"
    caption = (
        f"Modelled, not measured: {QUERIES} queries, top {TOP_K}, {WIDTH} numbers a row. Work:\n"
        f"that of all processes with 1, 2 and 4 shards of $10^6$ rows on one{state} machine.\n"
        "Assumed: a search grows with the square root of a shard's rows, 10 Gbit/s into the\n"
        "caller, 0.1 ms a round trip, one caller, all shards under way at once."
    )
    figure.text(0.02, 0.01, caption, fontsize=7.5, va="bottom")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=120)


def part_of(name: str, steps: int) -> dict[str, Any]:
    """One of `PARTS`; one process has all cores, a caller of shards one thread, as each of them."""
    torch.set_num_threads(os.cpu_count() or 1 if name == "one" else 1)
    if name == "one":
        return one_process(steps)
    count = int(name.removesuffix(" fine"))
    return over_shards(count, LISTS if name.endswith("fine") else LISTS // count, steps)


def main(
    steps: Annotated[int, typer.Option(help="Repetitions of each measurement.")] = 60,
    part: Annotated[str | None, typer.Option(help="One part only, as JSON.")] = None,
    again: Annotated[bool, typer.Option(help="Measure only what the JSON lacks.")] = False,
) -> None:
    """Measure each part in a process of its own, and write the JSON beside this file."""
    if part is not None:
        print(json.dumps(part_of(part, steps)))
        return
    place = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = {
        "machine": machine(),
        "setting": f"{ROWS} x {WIDTH} rows, {QUERIES} queries, top {TOP_K}, cosine, float32",
        "load_before": os.getloadavg()[0],
    }
    if again:
        result = json.loads(place.read_text())
    for name in [name for name in PARTS if name not in result]:
        command = [sys.executable, __file__, "--part", name, "--steps", str(steps)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result[name] = json.loads(output.splitlines()[-1])
        result["load_after"] = os.getloadavg()[0]
    result["is_quiet"] = result["load_before"] < 0.5  # nothing else was computed beside
    model = Model(result)
    result["model_milliseconds"] = model.coefficients()
    result["modelled_64_nodes_1e9_rows_milliseconds"] = model.seconds(64, 1e9) * 1e3
    text = json.dumps(result, indent=2)
    place.write_text(text + "\n")
    print(text)
    draw(model, result["is_quiet"], PICTURE)


if __name__ == "__main__":
    typer.run(main)
