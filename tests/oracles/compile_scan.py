"""Compiles the kernels of the exact search for an H100 and prints what they take."""

import torch

from sparsemem.indexes import device_scan
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
    assert len(made) == 4
    for kernel in made:
        shared, code = kernel.metadata.shared, len(kernel.asm["cubin"])
        print(f"{kernel.name} {width} {dtype} {metric} {queries}: {shared} shared, {code} bytes")
