"""Compiles the kernels of the searches of an index for an H100 and prints what they take."""

import torch

from sparsemem.indexes import device_scan
from sparsemem.indexes.base import Found
from sparsemem.indexes.device_ranking import Known, Proposals, current_entries, rank
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.hopper import compiled_for_hopper

CASES = [  # rows, width, dtype, queries, metric
    (1_000, 64, torch.float32, 64, Metric.cosine),
    (100_000, 5, torch.float32, 1, Metric.ip),
    (1_000, 100, torch.float32, 70, Metric.l2),
    (1_000, 64, torch.bfloat16, 64, Metric.l2),
    (1_000, 64, torch.float16, 3, Metric.cosine),
]

device_scan.ROUGH_ROWS = 0  # both passes

for count, width, dtype, queries, metric in CASES:
    table = RowTable(torch.zeros(count, width, dtype=dtype), torch.ones(count, dtype=torch.bool))
    with compiled_for_hopper() as made:
        device_scan.device_scan(table, metric, torch.zeros(queries, width), 8)
        numbers = torch.zeros(count, dtype=torch.int64)
        places = torch.zeros(count, dtype=torch.int32)
        current_entries(numbers, places, table.live, count)
        some = Found(torch.zeros(queries, 12), torch.zeros(queries, 12, dtype=torch.int64))
        known = Known(numbers, numbers, places, numbers)
        rank(table, metric, torch.zeros(queries, width), Proposals(*some, False), some, known, 8)
    assert len(made) == 6
    for kernel in made:
        shared, code = kernel.metadata.shared, len(kernel.asm["cubin"])
        print(f"{kernel.name} {width} {dtype} {metric} {queries}: {shared} shared, {code} bytes")
