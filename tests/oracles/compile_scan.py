"""Compiles the kernels of the searches of an index for an H100 and prints what they take."""

import re

import torch

from sparsemem.indexes import device_scan
from sparsemem.indexes.device_ranking import (
    Known,
    Proposals,
    comparable_queries,
    current_entries,
    rank,
)
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.hopper import compiled_for_hopper

CASES = [  # rows, width, dtype, queries, metric
    (1_000, 64, torch.float32, 64, Metric.cosine),
    (100_000, 5, torch.float32, 1, Metric.ip),
    (1_000, 100, torch.float32, 70, Metric.l2),
    (1_000, 64, torch.bfloat16, 64, Metric.l2),
    (1_000, 64, torch.float16, 3, Metric.cosine),
    (1_000, 16, torch.bfloat16, 3, Metric.ip),
]

device_scan.ROUGH_ROWS = 0  # both passes


def columns(kernel) -> str:
    """How the columns of rows are divided among threads when they are summed."""
    code = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg\.blocked<\{(.*?), warps", code))
    sums = re.findall(r"\}\) : \(tensor<(\d+)x\d+xf32, (#\w+)>\) -> tensor<(\d+)xf32", code)
    used = {layouts[name] for rows, name, left in sums if rows == left}
    return "; ".join(sorted(re.sub(r"\[\d+, ", "[.., ", layout) for layout in used))


for count, width, dtype, queries, metric in CASES:
    table = RowTable(torch.zeros(count, width, dtype=dtype), torch.ones(count, dtype=torch.bool))
    with compiled_for_hopper() as made:
        device_scan.device_scan(table, metric, torch.zeros(queries, width), 8)
        numbers = torch.zeros(count, dtype=torch.int64)
        places = torch.zeros(count, dtype=torch.int32)
        current_entries(numbers, places, table.live, count)
        vectors = comparable_queries(torch.zeros(queries, width), metric)
        labels = torch.zeros(queries, 12, dtype=torch.int64)
        known = Known(numbers, numbers, places, numbers)
        for is_all, beside in ((False, labels), (True, labels[:, :0])):
            proposals = Proposals(torch.zeros(queries, 12), labels, is_all)
            rank(table, metric, vectors, proposals, beside, known, 8)
    assert len(made) == 8
    for kernel in made:
        shared, code = kernel.metadata.shared, len(kernel.asm["cubin"])
        print(f"{kernel.name} {width} {dtype} {metric} {queries}: {shared} shared, {code} bytes")
    summed = {columns(kernel) for kernel in made if kernel.name in ("find_rows", "rank_proposals")}
    print("columns:", *summed, sep=" | ")
