"""Triton's kernels on rows, against plain torch in float64; and that they compile for a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (40, 5), (7, 1030), (9, 64), (0, 3)])
def test_sums_by_row(triton_device, count, width, dtype):
    from sparsemem.kernels.gpu.rows import sum_by_row

    ids = torch.randint(0, 6, (count,)) * 1000
    values = torch.randn(count, width).to(dtype)
    found, sums = sum_by_row(ids.to(triton_device), values.to(triton_device))
    assert torch.equal(found.cpu(), ids.sort().values)
    assert sums.dtype == torch.float32
    for row in ids.unique():
        of_row = sums.cpu()[found.cpu() == row].double()
        torch.testing.assert_close(of_row[0], values[ids == row].double().sum(0), **CLOSE)
        assert not of_row[1:].any()


def test_a_row_read_very_often_is_summed_in_order(triton_device):
    from sparsemem.kernels.gpu.rows import sum_by_row

    values = torch.randn(300, 2)
    ids = torch.zeros(300, dtype=torch.int64)
    _, sums = sum_by_row(ids.to(triton_device), values.to(triton_device))
    in_order = torch.zeros(2)
    for value in values:
        in_order += value
    assert torch.equal(sums[0].cpu(), in_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "k", "width"), [(3, 4, 5), (1, 1, 1), (2, 3, 1030), (0, 2, 4)])
def test_weighted_sums_and_their_gradient(triton_device, queries, k, width, dtype):
    from sparsemem.kernels.gpu.rows import weigh_rows, weights_gradient

    table = torch.randn(12, width).to(dtype)
    ids, weights = torch.randint(-1, 12, (queries, k)), torch.randn(queries, k)
    gradient = torch.randn(queries, width)
    given = [part.to(triton_device) for part in (table, ids, weights, gradient)]
    rows = table.double()[ids.clamp(min=0)].masked_fill((ids < 0).unsqueeze(-1), 0)
    sums = (weights.double().unsqueeze(-1) * rows).sum(1)
    torch.testing.assert_close(weigh_rows(*given[:3]).double().cpu(), sums, **CLOSE)
    products = (rows * gradient.double().unsqueeze(1)).sum(-1)
    found = weights_gradient(given[0], given[1], given[3])
    torch.testing.assert_close(found.double().cpu(), products, rtol=1e-4, atol=1e-4)


COMPILE = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
from sparsemem.kernels.gpu import row_steps, rows, score_gradients

def check(kernel, *arguments, **constants):
    assert kernel.warmup(*arguments, grid=(1,), **constants).asm["cubin"]

f32, half, ids, marks = map(MockTensor, (torch.float32, torch.bfloat16, torch.int64, torch.uint8))
cases = (f32, 1, 1, 1, True, True), (half, 50, 64, 1, True, False), (f32, 1500, 2048, 8, False, 0)
for table, width, block, warps, bank, selection in cases:
    check(rows._sum_segments, ids, ids, table, f32, 100, width, BLOCK=min(block, 1024))
    check(rows._weigh, table, width, ids, f32, f32, width, 7, BLOCK=min(block, 1024))
    check(rows._weights_gradient, table, width, ids, f32, f32, width, 1, BLOCK=min(block, 1024))
    given = (ids, ids, table, 100, width, marks, marks, marks, table, width)
    how = dict(IN_BANK=bank, IS_SELECTION=selection, BLOCK=block, num_warps=warps)
    momentum = dict(HAS_MOMENTUM=bank, NESTEROV=selection)
    check(row_steps._sgd, *given, f32, width, 0.1, 0.9, 0.0, **momentum, **how)
    check(row_steps._adagrad, *given, f32, 0.1, 0.0, 1e-10, **how)
    check(row_steps._adam, *given, f32, 2 * width, f32, 2 * width, f32, *[0.1] * 9, **how)
for metric, width, block, warps in (("cosine", 64, 64, 1), ("ip", 5, 8, 1), ("l2", 3000, 4096, 8)):
    given = (f32, f32, f32, ids, f32, f32, f32, f32, width, 8)
    how = dict(METRIC=metric, HAS_ROWS=True, BLOCK=block, num_warps=warps)
    check(score_gradients._score_gradients, *given, **how)
print("compiled")
"""


def test_the_compiler_takes_them(repository):
    """What the interpreter forgives, Triton's compiler does not: it needs no GPU for that."""
    pytest.importorskip("triton")
    ptxas = Path(__import__("triton").__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip("needs the compiler for NVIDIA's GPUs")
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.stdout == "compiled\n", done.stderr
