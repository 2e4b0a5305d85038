"""The exact search of a GPU against a plain sort of the rows' own scores in float64."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.indexes import device_scan
from sparsemem.indexes.device_scan import Shape, fits, shape_of
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.exact_search import agrees, search, table_of, worths
from tests.oracles.row_dictionary import LARGE_BUFFER, OPERATIONS, Kind, Manner, Work
from tests.oracles.synchronisations import Synchronisations

# The interpreter's maxima pass over what is not a number, as they should, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")

metrics = pytest.mark.parametrize("metric", list(Metric))
WIDTH = 16  # in most tests: on a GPU, each width is another kernel


@pytest.fixture(autouse=True)
def _the_interpreter_truncates(monkeypatch):
    """Where the compiler rounds to bfloat16."""
    if not torch.cuda.is_available():
        twice = {name: 2 * error for name, error in device_scan.ROUGH.items()}
        monkeypatch.setattr(device_scan, "ROUGH", twice)


@pytest.fixture
def rough(monkeypatch):
    """Small tables are searched as large ones are."""
    monkeypatch.setattr(device_scan, "ROUGH_ROWS", 0)


class WideWork(Work):
    """The work of every index's contract, on rows of one width of these tests."""

    width = WIDTH


@contextmanager
def waiting_refused(device: torch.device):
    """By torch itself, which knows on a GPU only."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [
        (Metric.cosine, torch.float32),
        (Metric.ip, torch.float32),
        (Metric.l2, torch.float32),
        (Metric.cosine, torch.bfloat16),
        (Metric.ip, torch.float16),
        (Metric.l2, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("beyond", [2**19, 0], ids=["fine", "rough"])
def test_finds_the_best_rows(metric, dtype, beyond, triton_device, monkeypatch):
    monkeypatch.setattr(device_scan, "ROUGH_ROWS", beyond)
    live = torch.rand(581) < 0.8
    live[128:384] = False  # whole tiles of them
    table = table_of(torch.randn(581, WIDTH).to(dtype), triton_device, live)
    agrees(table, metric, torch.randn(3, WIDTH), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "metric"), [(5, Metric.l2), (64, Metric.cosine), (100, Metric.l2)]
)
def test_rows_of_any_width(width, metric, dtype, triton_device, rough):
    table = table_of(torch.randn(150, width).to(dtype), triton_device)
    agrees(table, metric, torch.randn(1, width), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_queries_in_several_passes(dtype, triton_device, monkeypatch, rough):
    # 33 at once, as 64, and then 3: the products of half rows are turned for the first.
    monkeypatch.setattr(device_scan, "MOST_QUERIES", 33)
    table = table_of(torch.randn(150, 64).to(dtype), triton_device)  # in two tiles, or in three
    agrees(table, Metric.cosine, torch.randn(36, 64), 1)


def test_lists_that_are_looked_through_in_pieces(triton_device, monkeypatch):
    monkeypatch.setattr(device_scan, "MOST_MEMBERS", 64)
    monkeypatch.setattr(device_scan, "AHEAD", 16)
    monkeypatch.setattr(device_scan, "multiprocessors", lambda device: 1)
    shape = shape_of(WIDTH, "float32", 16)._replace(programs=1)
    monkeypatch.setattr(device_scan, "shape_of", lambda *sizes: shape)
    live = torch.rand(4500) < 0.02
    table = table_of(torch.randn(4500, WIDTH), triton_device, live)
    agrees(table, Metric.ip, torch.randn(2, WIDTH), 5)


@metrics
def test_equal_rows_are_found_in_the_order_of_their_ids(metric, triton_device):
    rows = torch.randn(1500, WIDTH).mul(2).round()  # sums are exact in the interpreter, too
    copies = torch.arange(30, 1500, 70)  # in more tiles than are scored again
    rows[copies] = rows[30].clone()
    query = rows[30:31] * 1.0
    if metric is Metric.ip:
        query = query * 100
        rows.clamp_(-1, 1)
        rows[copies] = query[0].sign()
    table = table_of(rows, triton_device)
    table.set_live(copies[1:3].to(triton_device), False)
    _, ids = search(table, metric, query, 6)
    assert ids.tolist() == [[30, *copies[3:8].tolist()]]


@metrics
def test_nothing_but_equal_rows(metric, triton_device):
    table = table_of(torch.zeros(1000, WIDTH), triton_device)
    table.set_live(torch.tensor([0, 2, 51], device=triton_device), False)
    _, ids = search(table, metric, torch.randn(2, WIDTH), 4)
    assert ids.tolist() == [[1, 3, 4, 5]] * 2


@metrics
def test_fewer_live_rows_than_asked_for(metric, triton_device):
    live = torch.zeros(500, dtype=torch.bool)
    live[torch.tensor([3, 300, 450])] = True
    table = table_of(torch.randn(500, WIDTH), triton_device, live)
    agrees(table, metric, torch.randn(2, WIDTH), 5)
    table.set_live(torch.tensor([3, 300, 450], device=triton_device), False)
    scores, ids = search(table, metric, torch.randn(2, WIDTH), 2)
    assert ids.tolist() == [[-1, -1]] * 2
    assert (scores == metric.missing).all()


def test_no_rows_and_no_queries(triton_device):
    table = table_of(torch.randn(40, WIDTH), triton_device, torch.zeros(40, dtype=torch.bool))
    scores, ids = search(table, Metric.ip, torch.randn(2, WIDTH), 3)
    assert ids.tolist() == [[-1] * 3] * 2
    assert scores.tolist() == [[-torch.inf] * 3] * 2
    scores, ids = search(
        table_of(torch.randn(40, WIDTH), triton_device), Metric.ip, torch.empty(0, WIDTH), 3
    )
    assert scores.shape == ids.shape == (0, 3)


def test_as_many_rows_as_can_be_asked_for(triton_device):
    table = table_of(torch.randn(500, WIDTH), triton_device)
    agrees(table, Metric.cosine, torch.randn(1, WIDTH), 128)


@metrics
def test_a_row_that_is_not_a_number_ranks_last(metric, triton_device):
    rows = torch.randn(120, WIDTH)
    rows[60] = torch.nan
    live = torch.ones(120, dtype=torch.bool)
    live[64:] = False
    scores, ids = search(table_of(rows, triton_device, live), metric, torch.ones(1, WIDTH), 65)
    assert ids[0, 63:].tolist() == [60, -1]
    assert scores[0, 63:].tolist() == [metric.missing] * 2
    assert scores[0, :63].isfinite().all()
    # Alone in its tile it is better than nothing.
    live[:64] = torch.arange(64) == 60
    _, ids = search(table_of(rows, triton_device, live), metric, torch.ones(1, WIDTH), 2)
    assert ids.tolist() == [[60, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_distances_far_from_the_origin(dtype, triton_device):
    rows = (1000 + torch.randn(600, WIDTH)).to(dtype)
    queries = rows[:2].float() + 0.01
    table = table_of(rows, triton_device)
    _, ids = search(table, Metric.l2, queries, 3)
    best = worths(table, Metric.l2, queries).topk(3).values
    torch.testing.assert_close(worths(table, Metric.l2, queries).gather(1, ids), best)


@metrics
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_queries_of_any_size(metric, scale, triton_device):
    table = table_of(torch.randn(150, WIDTH).half(), triton_device)
    query = torch.randn(1, WIDTH)
    scores, ids = search(table, metric, scale * query, 2)
    assert scores.isfinite().all()
    if metric is not Metric.l2:  # there all distances become those of the query, or of the rows
        own = worths(table, metric, query)
        torch.testing.assert_close(own.gather(1, ids), own.topk(2).values, rtol=1e-4, atol=0)


def test_rows_of_a_wider_table(triton_device):
    wide = torch.randn(300, 40, device=triton_device)
    table = RowTable(wide[:, 8:24], torch.ones(300, dtype=torch.bool, device=triton_device))
    agrees(table, Metric.ip, torch.randn(2, WIDTH), 2)


def test_a_search_waits_for_nothing(triton_device):
    table = table_of(torch.randn(200, WIDTH), triton_device)
    queries = torch.randn(2, 16, device=triton_device)
    found = [device_scan.device_scan(table, metric, queries, 2) for metric in Metric]
    with Synchronisations() as waits, waiting_refused(triton_device):
        again = [device_scan.device_scan(table, metric, queries, 2) for metric in Metric]
    assert waits.found == []
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(found, again, strict=True))


def test_rows_that_are_changed_in_place_are_found(triton_device):
    table = table_of(torch.randn(400, WIDTH), triton_device)
    index = ExactIndex(table, Metric.cosine)
    query = torch.ones(1, WIDTH, device=triton_device)
    index.update(torch.tensor([399], device=triton_device), 3 * query)
    assert index.search(query, 1).ids.tolist() == [[399]]
    index.remove(torch.tensor([399], device=triton_device))
    assert index.search(query, 1).ids.tolist() != [[399]]


@settings(max_examples=12, suppress_health_check=list(HealthCheck), database=None)
@given(st.integers(1, 260), st.integers(1, 4), st.sampled_from(Metric), st.integers(0, 2**20))
def test_small_tables_of_few_values(triton_device, count, k, metric, seed):
    # All sums are exact: the result is the same, ties included.
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, 2, (count, WIDTH), generator=generator).float()
    live = torch.rand(count, generator=generator) < 0.7
    queries = torch.randint(-2, 3, (2, WIDTH), generator=generator).float()
    table = table_of(rows, triton_device, live)
    _, ids = search(table, metric, queries, k)
    own = worths(table, metric, queries).float()
    order = own.argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = torch.where(own.gather(1, order) == -torch.inf, -1, order)
    if metric is Metric.cosine:  # multiples of a row differ by rounding
        seen = own.gather(1, ids.clamp(min=0))[ids >= 0]
        torch.testing.assert_close(seen, own.gather(1, order)[expected[:, : ids.shape[1]] >= 0])
    else:
        assert ids[:, : order.shape[1]].tolist() == expected.tolist()


@metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_scan_without_kernels_on_any_device(metric, dtype, device, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    table = table_of(torch.randn(300, 8, dtype=dtype), device, torch.rand(300) < 0.8)
    agrees(table, metric, torch.randn(3, 8, dtype=dtype), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [300_001, 3_500_000])
def test_large_tables(count, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    live = torch.rand(count) < 0.9
    table = table_of(torch.randn(count, 64, device="cuda").to(dtype), "cuda", live)
    agrees(table, Metric.cosine, torch.randn(40, 64), 8)
    table.rows[:: count // 100] = table.rows[7]  # about 100 equal ones
    _, ids = search(table, Metric.cosine, table.rows[7:8].float(), 9)
    copies = torch.arange(0, count, count // 100)
    expected = sorted({7, *copies.tolist()} & set(live.nonzero().flatten().tolist()))
    assert ids.tolist() == [expected[:9]]


def test_the_kernels_compile_for_an_h100(repository):
    # In a process where Triton is no interpreter, which lets pass what the compiler does not.
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.compile_scan"],
        cwd=repository,
        env=variables | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shared = [int(size) for size in re.findall(r"(\d+) shared", done.stdout)]
    assert len(shared) == 48
    assert max(shared) < 227 * 1024 / 2  # two programs at least share a multiprocessor
    # Sums over a row's numbers are taken in one order, wherever the row is ranked.
    orders = re.findall(r"columns: \| (.*)", done.stdout)
    assert len(orders) == 6
    assert all(order.count("sizePerThread") == 1 for order in orders)


def test_what_the_kernels_can_search():
    table = RowTable(torch.zeros(4, 8), torch.ones(4, dtype=torch.bool))
    assert fits(table, 128)
    assert not fits(table, 129)
    assert not fits(RowTable(torch.zeros(4, 513), table.live), 1)
    assert not fits(RowTable(torch.zeros(4, 8, dtype=torch.float64), table.live), 1)
    assert not fits(RowTable(torch.zeros(8, 4).T, torch.ones(4, dtype=torch.bool)), 1)


def test_columns_are_a_power_of_two_that_a_product_takes():
    assert shape_of(5, "float32", 16) == Shape(64, 16, 4, 3, 3, 168)
    assert shape_of(100, "float32", 128) == Shape(64, 32, 4, 3, 2, None)
    assert shape_of(64, "bfloat16", 64) == Shape(128, 64, 4, 3, 3, None)
    assert shape_of(64, "rough float32", 128) == Shape(128, 64, 4, 3, 2, None)
    assert shape_of(64, "rough centered", 128) == Shape(64, 64, 4, 3, 2, None)


@settings(max_examples=3, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS[:3]), st.integers(0, 2**20)), max_size=5),
    st.sampled_from([Metric.ip, Metric.l2]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_contract_of_every_index(triton_device, operations, metric, dtype):
    # All that is summed is exact in float32, so scores are compared as they are.
    with triton_device:
        kind = Kind("exact", exact=True, fresh=False, ks=(1, 5))
        done = WideWork(kind, metric, dtype, Manner(20, LARGE_BUFFER, steady=True))
        for operation, seed in operations:
            done.apply(operation, seed)
