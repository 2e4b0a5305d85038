"""Rough passes of a GPU's exact search: bounds that hold, and what is searched again."""

from contextlib import contextmanager

import pytest
import torch

from sparsemem.indexes import device_scan
from sparsemem.indexes.device_scan import shape_of
from sparsemem.indexes.metrics import Metric
from tests.oracles.exact_search import agrees, search, table_of, worths

# The interpreter's maxima pass over what is not a number, as they should, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")

metrics = pytest.mark.parametrize("metric", list(Metric))
WIDTH = 16  # on a GPU, each width is another kernel


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


@contextmanager
def passes(monkeypatch):
    """Which queries each pass has left unsure."""
    seen, one_pass = [], device_scan.one_pass

    def watched(work, *rest):
        one_pass(work, *rest)
        seen.append(work.unsure.tolist())

    with monkeypatch.context() as patch:
        patch.setattr(device_scan, "one_pass", watched)
        yield seen


def close_rows(query: torch.Tensor, count: int, spread: float) -> torch.Tensor:
    """Rows near to a query, of many lengths; they differ by less than rounding to 16 bits does."""
    near = query + spread * torch.randn(count, len(query))
    return near * torch.rand(count, 1).add(0.5)


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [
        (Metric.cosine, torch.float32),
        (Metric.ip, torch.float32),
        (Metric.l2, torch.float32),
        (Metric.cosine, torch.bfloat16),
    ],
    ids=str,
)
def test_what_a_rough_pass_leaves_unsure_is_searched_again(
    metric, dtype, triton_device, monkeypatch, rough
):
    monkeypatch.setattr(device_scan, "ROUGH_TILES", 1)
    query = torch.randn(WIDTH)
    rows = close_rows(query, 700, 0.01)
    if metric is not Metric.cosine:  # for which their lengths do not matter
        rows = rows / rows.norm(dim=1, keepdim=True) * query.norm()
    table = table_of(rows.to(dtype), triton_device)
    queries = torch.stack([query, 100 * torch.randn(WIDTH)])
    with passes(monkeypatch) as seen:
        agrees(table, metric, queries, 3)
    assert len(seen) == 2
    assert seen[0][0] == 1, "more tiles may matter than were scored"
    assert seen[1] == [0, 0]


def test_queries_that_are_sure_are_not_searched_again(triton_device, monkeypatch, rough):
    rows = 0.1 * torch.randn(1500, WIDTH)
    rows[[40, 700, 1400]] = torch.ones(WIDTH)
    table = table_of(rows, triton_device)
    with passes(monkeypatch) as seen:
        _, ids = search(table, Metric.ip, torch.ones(2, WIDTH), 3)
    assert seen[0] == [0, 0]
    assert ids.tolist() == [[40, 700, 1400]] * 2


@pytest.mark.parametrize("tiles", [0, 64])
def test_near_ties_over_many_tiles(tiles, triton_device, monkeypatch, rough):
    # The rows' cosines differ by some 2^-16: rough products say nothing of their order.
    monkeypatch.setattr(device_scan, "ROUGH_TILES", tiles)
    query = torch.randn(WIDTH)
    table = table_of(close_rows(query, 800, 2.0**-8), triton_device)
    _, ids = search(table, Metric.cosine, query[None], 6)
    own = worths(table, Metric.cosine, query[None])
    torch.testing.assert_close(own.gather(1, ids), own.topk(6).values, rtol=0, atol=3e-7)


@metrics
@pytest.mark.parametrize("product", ["rough float32", "rough", "float32", "bfloat16"])
def test_no_score_exceeds_the_bound_of_its_tile(metric, product, triton_device):
    half = product in ("rough", "bfloat16")
    if half and metric is Metric.l2:
        pytest.skip("half rows are moved, and then no longer half")
    rows = torch.rand(1000, WIDTH, dtype=torch.float64).add(0.5).float()  # all errors add up
    table = table_of(rows.bfloat16() if half else rows, triton_device)
    queries = torch.rand(5, WIDTH).add(0.5).to(triton_device)
    kind = device_scan.pass_of(table, metric, rough="rough" in product)
    centered = metric is Metric.l2 and "rough" in product
    assert kind.product == ("rough centered" if centered else product)
    center = device_scan.middle(queries) if metric is Metric.l2 else queries
    unsure = torch.ones(5, dtype=torch.int32, device=triton_device)
    work = device_scan.Work(table, metric, queries, center, unsure)
    shape = shape_of(WIDTH, kind.product, 16)
    best, _ = device_scan.scan_tiles(work, kind, shape)
    moved = (queries - center if metric is Metric.l2 else queries).double()
    scale, length = moved.abs().amax(1).log2().floor().exp2(), moved.norm(dim=1)
    own, slack = worths(table, metric, queries), torch.zeros_like(length)
    if metric is Metric.l2:
        own, slack = (own + length[:, None].square()) / 2, kind.error * length.square()
    elif metric is Metric.cosine:
        own, slack = own * length[:, None], kind.error * length
    units = (own / scale[:, None]).split(shape.rows, 1)
    highest = torch.stack([part.amax(1) for part in units])
    assert (highest <= best[:, :5].double() + slack / scale).all()
