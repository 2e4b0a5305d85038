"""How a GPU's exact search is best cut into programs: times of the shapes of `device_scan`.

    python benchmarks/gpu_scan_tuning.py [--rows 1000000] [--width 64] [--dtype float32]
        [--queries 64] [--top-k 8]

Prints, for each shape, the milliseconds of a search and of its first step alone (the median of
what CUDA events say), and how many times the time it takes to read rows and marks once at the
speed of a copy on this GPU. Takes about 20 s, most of them to compile.

Expected where copies run at 4.2 TB/s, for 10^7 rows, width 64, 64 queries, cosine: a first step at
85 % of that speed, since one product instead of three takes 0.2 ms of the tensor cores; and some 14
tiles of 3 us after another in the second step, for the 8 best and 6 that rough products leave. So
0.71 + 0.04 ms in float32 (1.25 times the limit), and 0.36 + 0.04 ms in bfloat16 (1.3 times).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from sparsemem.indexes import device_scan
from sparsemem.indexes.device_scan import Shape, shape_of
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

REPEATS = 20


def shapes(width: int, product: str, queries: int) -> list[Shape]:
    """What is tried: the library's own choice first.

    For 128 queries the sums take half of the registers: fewer rows, or twice the threads.
    """
    own, few = shape_of(width, product, queries), queries <= 64
    half = own.part
    if "float32" in product:
        others = [
            Shape(128, half, 4, 2, 3),
            Shape(128, half, 4, 3, 2),
            Shape(128, half, 8, 3, 2),
            Shape(64, half, 4, 3, 3, 168),
            Shape(64, half, 4, 4, 3),
            Shape(64, half, 4, 3, 4, 128),
        ]
    else:
        others = [
            Shape(128, half, 4, 3, 2),
            Shape(128, half, 4, 4, 3),
            Shape(128, half, 4, 4, 4, 128),
            Shape(128, half, 4, 5, 3),
            Shape(128, half, 8, 4, 2 if few else 1),
            Shape(64, half, 4, 4, 4 if few else 2),
        ]
    if not few:
        others = [shape for shape in others if shape.registers != 128 and shape.programs < 4]
    return [own, *(shape for shape in others if shape != own)]


def median_ms(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median time on the GPU of one call after another, the first not counted."""
    work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def copy_speed(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)


def tune(
    table: RowTable, queries: Tensor, k: int, metric: Metric = Metric.cosine
) -> list[tuple[Shape, float, float]]:
    """(shape, ms of a search, ms of its first step) for each shape, those that fail left out."""
    kind = device_scan.pass_of(table, metric, rough=table.extent > device_scan.ROUGH_ROWS)
    padded = max(16, device_scan.power_of_two(len(queries)))
    unsure = torch.ones(len(queries), dtype=torch.int32, device=queries.device)
    work = device_scan.Work(table, metric, queries, device_scan.middle(queries), unsure)
    found = []
    for shape in shapes(table.width, kind.product, padded):
        try:
            whole = median_ms(partial(device_scan.device_scan, table, metric, queries, k, shape))
            first = median_ms(partial(device_scan.scan_tiles, work, kind, shape))
        except Exception as error:  # too much shared memory for this GPU, mostly
            print(f"{shape}: {type(error).__name__}: {str(error)[:100]}")
            continue
        found.append((shape, whole, first))
    return found


def filled(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> RowTable:
    """A table of random rows, written in parts."""
    made = torch.empty(rows, width, dtype=dtype, device=device)
    for part in made.split(10**7):
        part.normal_()
    return RowTable(made, torch.ones(rows, dtype=torch.bool, device=device))


def main() -> None:
    """Parse arguments, time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=device_scan.DTYPES.values())
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--metric", default="cosine", choices=[str(metric) for metric in Metric])
    given = parser.parse_args()
    device = torch.device("cuda")
    table = filled(given.rows, given.width, getattr(torch, given.dtype), device)
    queries = torch.randn(given.queries, given.width, device=device)
    speed = copy_speed(device)
    limit = (table.rows.nbytes + table.live.nbytes) / speed * 1e3
    print(f"{torch.cuda.get_device_name(device)}: copies {speed / 1e12:.2f} TB/s, rows read once")
    print(
        f"in {limit:.3f} ms ({given.rows} x {given.width} {given.dtype}, {given.queries} queries)"
    )
    for shape, whole, first in tune(table, queries, given.top_k, Metric(given.metric)):
        times = f"search {whole:.3f} ms, {whole / limit:.2f} times; first step {first:.3f} ms"
        print(f"{tuple(shape)}: {times}", flush=True)


if __name__ == "__main__":
    main()
