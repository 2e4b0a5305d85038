"""Recall and search time while rows drift: python benchmarks/drift.py (12 minutes).

A bank of 1M x 64 rows, of which a fifth is moved far by gradient steps while queries about the
moving rows go on at full speed. Beside it, on the same rows and queries: a plain FAISS index
that is left alone, and one that is built anew every 500 steps. Writes drift.json and
docs/drift.png.

The run is recorded first, at full speed: nothing but steps and searches. Then the same steps are
repeated on a plain table, where exact search says what the recorded searches should have found.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import faiss
import numpy as np
import torch
import typer
from clusters import clustered
from common import machine, recalls
from torch import Tensor

from sparsemem import MemoryBank
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.kinds import to_faiss
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from sparsemem.optim import RowSGD

INDEX, WIDTH, TOP_K, FLOOR = "IVF4096,Flat", 64, 8, 0.95
MOVED_AT_ONCE, RATE, VISITS = 512, 0.2, 8  # 0.8^8: a sixth of the way is left
QUERIES, JUDGED = 16, 4  # queries of a search; how many of them are compared with the truth
REBUILT_EVERY, WINDOW = 500, 1_000
COLOURS = {"bank": "#1f6f8b", "left alone": "#b8480f", "rebuilt": "#8a8a8a"}


class Step(NamedTuple):
    """One step of the drift: rows that move, and rows that are asked about, with noise."""

    rows: Tensor
    asked: Tensor
    noise: Tensor


class Drift:
    """The same steps every time it is asked."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.start = clustered(num_rows, WIDTH, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.moving = torch.randperm(num_rows, generator=generator)[: num_rows // 5]
        self.goal = clustered(len(self.moving), WIDTH, seed + 2)  # other clusters
        visits = [torch.randperm(len(self.moving), generator=generator) for _ in range(VISITS)]
        order = torch.cat(visits)
        whole = len(order) // MOVED_AT_ONCE * MOVED_AT_ONCE
        self.parts = torch.split(order[:whole], MOVED_AT_ONCE)
        self._seed = seed + 3

    def __len__(self) -> int:
        return len(self.parts)

    def step(self, number: int) -> Step:
        """Step `number`; from the last one on nothing moves and only queries go on."""
        generator = torch.Generator().manual_seed(self._seed + number)
        rows = self.parts[number] if number < len(self) else self.parts[0][:0]
        asked = torch.randint(len(self.moving), (QUERIES,), generator=generator)
        return Step(rows, asked, 0.1 * torch.randn(QUERIES, WIDTH, generator=generator))


class Record(NamedTuple):
    """What a search gave, how long it took, and whether a rebuild went on beside it."""

    ids: Any
    seconds: float
    building: bool


def run(drift: Drift, steps: int) -> tuple[list[Record], dict[str, Any], int]:
    """Steps and searches of the bank at full speed; with its figures and its first effort."""
    bank = MemoryBank(len(drift.start), WIDTH, index=INDEX, min_recall=FLOOR)
    bank.write(torch.arange(len(drift.start)), drift.start)
    while bank.index.current is None:
        time.sleep(0.1)
    optimiser = RowSGD([bank.keys], lr=RATE)
    effort, records = bank.stats()["effort"], []
    for number in range(steps):
        step = drift.step(number)
        if len(step.rows):
            optimiser.zero_grad()
            loss = (bank.gather(drift.moving[step.rows]) - drift.goal[step.rows]).square().sum() / 2
            loss.backward()
            optimiser.step()
        queries = bank.keys.detach()[drift.moving[step.asked]] + step.noise
        building = bank.index.next is not None
        start = time.perf_counter()
        hit = bank.read(queries, TOP_K)
        seconds = time.perf_counter() - start
        records.append(Record(hit.ids.numpy(), seconds, building or bank.index.next is not None))
    stats = bank.stats()
    bank.close()
    return records, stats, effort


def plain(rows: Tensor, effort: int) -> tuple[Any, float]:
    """A FAISS index as anybody would build it, and the seconds that took."""
    start = time.perf_counter()
    index = faiss.index_factory(WIDTH, INDEX, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 6, 32  # as the bank's
    vectors = to_faiss(rows, Metric.cosine)
    index.train(vectors)
    index.add(vectors)
    index.nprobe = effort
    return index, time.perf_counter() - start


def judge(drift: Drift, records: list[Record], effort: int) -> dict[str, Any]:
    """Recall of what was recorded, and of two plain indices, on the same steps."""
    table = RowTable(drift.start.clone(), torch.ones(len(drift.start), dtype=torch.bool))
    exact = ExactIndex(table, Metric.cosine)
    alone, built = plain(table.rows, effort)
    rebuilt, builds = alone, [built]
    shares: dict[str, list[float]] = {"bank": [], "left alone": [], "rebuilt": []}
    times: dict[str, list[float]] = {"left alone": [], "rebuilt": []}
    for number, record in enumerate(records):
        step = drift.step(number)
        ids = drift.moving[step.rows]
        table.rows[ids] -= RATE * (table.rows[ids] - drift.goal[step.rows])
        if number and number % REBUILT_EVERY == 0 and number < len(drift):
            rebuilt, built = plain(table.rows, effort)
            builds.append(built)
        queries = table.rows[drift.moving[step.asked]] + step.noise
        truth = exact.search(queries[:JUDGED], TOP_K).ids.numpy()
        shares["bank"] += recalls(record.ids[:JUDGED], truth)
        vectors = to_faiss(queries, Metric.cosine)
        for name, index in (("left alone", alone), ("rebuilt", rebuilt)):
            start = time.perf_counter()
            found = index.search(vectors, TOP_K)[1]
            times[name].append(time.perf_counter() - start)
            shares[name] += recalls(found[:JUDGED], truth)
    return {"recalls": shares, "times": times, "builds": builds}


def windows(recalls: list[float]) -> Any:
    """Mean recall of every window of 1,000 consecutive judged queries."""
    sums = np.cumsum([0.0, *recalls])
    size = min(WINDOW, len(recalls))
    return (sums[size:] - sums[:-size]) / size


def figures(records: list[Record], judged: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the run."""
    normal = np.array([r.seconds for r in records if not r.building]) * 1e3
    during = np.array([r.seconds for r in records if r.building]) * 1e3
    lowest = {name: float(windows(values).min()) for name, values in judged["recalls"].items()}
    result = {
        "lowest_recall_in_any_1000_queries": lowest,
        "mean_recall": {name: float(np.mean(v)) for name, v in judged["recalls"].items()},
        "search_ms_normal_median": float(np.median(normal)),
        "search_ms_normal_p99": float(np.percentile(normal, 99)),
        "searches_beside_a_rebuild": len(during),
        "plain_search_ms_median": {
            name: float(np.median(values) * 1e3) for name, values in judged["times"].items()
        },
        "plain_rebuild_seconds": judged["builds"],
    }
    if len(during):
        p99 = float(np.percentile(during, 99))
        result["search_ms_beside_a_rebuild_p99"] = p99
        result["p99_beside_a_rebuild_to_normal_median"] = p99 / float(np.median(normal))
    return result


def draw(records: list[Record], judged: dict[str, Any], moving: int, path: Path) -> None:
    """Recall above, search time below, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 6.5), sharex=True)
    draw_recalls(top, judged["recalls"])
    draw_seconds(bottom, np.array([record.seconds for record in records]))
    building = np.array([record.building for record in records])
    for axis in (top, bottom):
        axis.axvline(moving, color="black", linewidth=0.6)
        shade(axis, building)
        axis.spines[["top", "right"]].set_visible(False)
    top.text(moving, 1.03, " rows stop moving", ha="left", va="bottom", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_recalls(axis: Any, recalls: dict[str, Any]) -> None:
    """Means over the last queries, of the bank and of the plain indices."""
    labels = {
        "bank": "MemoryBank",
        "left alone": "plain FAISS index, left alone",
        "rebuilt": f"plain FAISS index, rebuilt every {REBUILT_EVERY} steps (searches wait)",
    }
    for name, values in recalls.items():
        mean = windows(values)
        place = (np.arange(len(mean)) + min(WINDOW, len(values))) / JUDGED
        axis.plot(place, mean, color=COLOURS[name], label=labels[name], linewidth=1.6)
    axis.axhline(FLOOR, color="black", linestyle=":", linewidth=1, label=f"min_recall = {FLOOR}")
    axis.set_ylabel(f"recall@{TOP_K}, last {WINDOW} queries")
    axis.set_ylim(0, 1.02)
    axis.legend(loc="lower left", frameon=False)


def draw_seconds(axis: Any, seconds: np.ndarray) -> None:
    """Of each of the bank's searches."""
    axis.plot(seconds * 1e3, ".", color=COLOURS["bank"], markersize=1.5, alpha=0.5)
    axis.set_yscale("log")
    axis.set_ylabel(f"ms a search of {QUERIES} queries")
    axis.set_xlabel("step")
    note = "shaded: lists are trained anew in the background"
    axis.text(0.01, 0.95, note, fontsize=8, transform=axis.transAxes, va="top")


def shade(axis: Any, building: np.ndarray) -> None:
    """The steps at which an index was built in the background."""
    axis.fill_between(
        np.arange(len(building)),
        0,
        1,
        where=building,
        color="#f0c96a",
        alpha=0.35,
        transform=axis.get_xaxis_transform(),
        linewidth=0,
    )


def main(
    rows: Annotated[int, typer.Option(help="Rows of the bank.")] = 1_000_000,
    after: Annotated[int, typer.Option(help="Steps once nothing moves any more.")] = 2_000,
    output: Annotated[Path, typer.Option(help="Where drift.json goes.")] = Path(__file__).parent,
    picture: Annotated[Path, typer.Option()] = Path(__file__).parent.parent / "docs/drift.png",
) -> None:
    """Run, judge, write the figures and draw them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    drift = Drift(rows)
    records, stats, effort = run(drift, len(drift) + after)
    judged = judge(drift, records, effort)
    result = {
        "machine": machine(),
        "setting": f"{rows:,} x {WIDTH}, {INDEX}, top {TOP_K}, {QUERIES} queries a search, a fifth"
        f" of the rows moved in {len(drift)} steps of {MOVED_AT_ONCE}, min_recall {FLOOR}",
        **figures(records, judged),
        "stats_at_the_end": stats,
    }
    text = json.dumps(result, indent=2)
    (output / "drift.json").write_text(text + "\n")
    draw(records, judged, len(drift), picture)
    print(text)


if __name__ == "__main__":
    typer.run(main)
