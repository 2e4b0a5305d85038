"""The kernels that rank proposals: against loops over Python's floats, and within an index."""

import contextlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem import MemoryBank
from sparsemem.indexes import device_ranking, device_scan
from sparsemem.indexes.device_ranking import (
    Entries,
    Known,
    Proposals,
    current_entries,
    rank,
    ranks,
)
from sparsemem.indexes.device_scan import device_scan as scan
from sparsemem.indexes.metrics import COSINE_EPSILON, Metric
from tests.oracles.device_index import ids_of, make
from tests.oracles.device_kind import DeviceKind
from tests.oracles.exact_search import table_of
from tests.oracles.fresh_index import K, N, clustered
from tests.oracles.launches import Launches
from tests.oracles.row_dictionary import LARGE_BUFFER, OPERATIONS, Manner, Work

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:RuntimeWarning")
    for message in ("overflow encountered", "invalid value")  # of the interpreter
]
W, ROWS, LABELS, ENTRIES = 6, 40, 90, 25


def score(metric, query, row) -> float:
    """Of lists of floats."""
    if metric is Metric.l2:
        return sum((q - r) ** 2 for q, r in zip(query, row, strict=True))
    dot = sum(q * r for q, r in zip(query, row, strict=True))
    if metric is Metric.ip:
        return dot
    lengths = [sum(x * x for x in side) + COSINE_EPSILON for side in (query, row)]
    return dot / math.sqrt(lengths[0] * lengths[1])


class State:
    """Rows, entries of an index and of a buffer, some stale, and what they propose."""

    def __init__(self, device, metric, dtype, seed, wanted=20, besides=6, ties=False):
        generator = torch.Generator().manual_seed(seed)

        def below(limit, *shape):
            return torch.randint(limit, shape, generator=generator)

        rows = torch.randn(ROWS, W, generator=generator)
        rows = (rows.round() if ties else rows).to(dtype)
        live = torch.rand(ROWS, generator=generator) < 0.8
        self.metric, self.table = metric, table_of(rows, device, live)
        queries = torch.randn(7, W, generator=generator)
        self.queries = (queries.round() if ties else queries).to(device)
        row_of = below(ROWS, LABELS)
        label_of = torch.zeros(ROWS, dtype=torch.int64)
        label_of[row_of] = torch.arange(1, LABELS + 1)  # a later label of a row, or an earlier one
        entries = below(ROWS, ENTRIES)
        place = torch.zeros(ROWS, dtype=torch.int32)
        for number, row in enumerate(entries[: ENTRIES // 3].tolist()):
            place[row] = number + 1
        known = (row_of, label_of, place, entries)
        self.known = Known(*(part.to(device) for part in known))
        labels = torch.stack(
            [torch.randperm(LABELS, generator=generator)[:wanted] for _ in range(7)]
        )
        labels[below(2, 7) > 0, wanted // 2 :] = -1
        scores = torch.randn(7, wanted, generator=generator)
        self.proposals = Proposals(scores.to(device), labels.contiguous().to(device), seed % 3 == 0)
        current = current_entries(self.known.entries, self.known.place, self.table.live, ENTRIES)
        self.current = current
        self.beside = torch.empty(7, 0, dtype=torch.int64, device=device)
        if besides:
            buffered = Entries(self.table.rows[self.known.entries], current, ENTRIES)
            self.beside = scan(buffered, metric, self.queries, besides).ids

    def rank(self, k):
        return rank(
            self.table, self.metric, self.queries, self.proposals, self.beside, self.known, k
        )

    def expected(self, query, k):
        """The best (score, id), and whether that is unsure: by loops."""
        rows = self.table.take(torch.arange(ROWS, device=self.table.rows.device)).double().tolist()
        row_of, label_of, place, entries = (part.tolist() for part in self.known)
        live, sign = self.table.live.tolist(), self.metric.sign
        valid = []
        for label in self.proposals.labels[query].tolist():
            row = row_of[label]
            if label >= 0 and label_of[row] == label + 1 and not place[row] and live[row]:
                valid.append(row)
        found = valid + [entries[at] for at in self.beside[query].tolist() if at >= 0]
        own = self.queries[query].double().tolist()
        best = sorted((-sign * score(self.metric, own, rows[row]), row) for row in found)[:k]
        least = min(k, self.table.num_live)
        worst = -best[least - 1][0] if len(best) >= least else -math.inf
        last, label = (part[query, -1].item() for part in self.proposals[:2])
        hidden = len(valid) < least and label >= 0 and not self.proposals.are_all
        lacks = len(best) < least or (hidden and last * sign > worst)
        if self.beside.numel() and (end := int(self.beside[query, -1])) >= 0:
            beyond = sign * score(self.metric, own, rows[entries[end]])
            lacks = lacks or beyond >= worst - 1e-5 * abs(worst)  # never just beside it
        return best, lacks


CASES = [
    (Metric.cosine, torch.float32, False),
    (Metric.ip, torch.float32, True),
    (Metric.l2, torch.float32, True),
    (Metric.l2, torch.bfloat16, False),
    (Metric.ip, torch.float16, True),
]


@pytest.mark.parametrize(("metric", "dtype", "ties"), CASES, ids=str)
@pytest.mark.parametrize(
    ("k", "wanted", "besides"), [(4, 20, 6), (1, 70, 3), (30, 20, 25), (5, 9, 0)]
)
def test_ranks_as_loops_do(metric, dtype, ties, k, wanted, besides, triton_device):
    for seed in range(3):
        state = State(triton_device, metric, dtype, seed, wanted, besides, ties)
        found, unsure = state.rank(k)
        for query in range(7):
            best, lacks = state.expected(query, k)
            ids = found.ids[query].tolist()
            assert ids == [row for _, row in best] + [-1] * (k - len(best))
            scores = [-metric.sign * value for value, _ in best]
            scores += [metric.missing] * (k - len(best))
            assert found.scores[query].tolist() == pytest.approx(scores, rel=2e-6, abs=2e-6)
            assert bool(unsure[query]) == lacks


def test_the_latest_entries_of_live_rows_are_current(triton_device):
    state = State(triton_device, Metric.ip, torch.float32, 1)
    _, _, place, entries = (part.tolist() for part in state.known)
    live = state.table.live.tolist()
    expected = [live[row] and place[row] == number + 1 for number, row in enumerate(entries)]
    assert state.current.tolist() == expected
    assert sum(expected) > 2
    assert sum(expected) < ENTRIES // 3


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("width", [16, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_those_of_an_exact_search_to_the_last_bit(metric, width, dtype, triton_device):
    table = table_of(torch.randn(50, width).to(dtype), triton_device)
    queries = torch.randn(3, width, device=triton_device)
    truth = scan(table, metric, queries, 20)
    labels = torch.stack([torch.randperm(50) for _ in range(3)]).to(triton_device)
    rows = torch.arange(50, device=triton_device)
    known = Known(rows, rows + 1, torch.zeros_like(rows, dtype=torch.int32), rows[:1])
    none = torch.empty(3, 0, device=triton_device)
    proposals = Proposals(torch.zeros(3, 50, device=triton_device), labels, True)
    found, unsure = rank(table, metric, queries, proposals, none.long(), known, 20)
    assert torch.equal(found.ids, truth.ids)
    assert torch.equal(found.scores, truth.scores)
    assert not unsure.any()


def test_a_score_that_is_not_a_number_ranks_last(triton_device):
    rows = torch.ones(4, W)
    rows[1] = 3e38  # its products overflow to infinities of both signs
    table = table_of(rows, triton_device)
    queries = torch.tensor([[3e38, -3e38, 0, 0, 0, 0]], device=triton_device)
    ids = torch.arange(4, device=triton_device)
    known = Known(ids, ids + 1, torch.zeros_like(ids, dtype=torch.int32), ids[:1])
    none = torch.empty(1, 0, device=triton_device)
    proposals = Proposals(torch.zeros(1, 4, device=triton_device), ids.unsqueeze(0), True)
    found, _ = rank(table, Metric.ip, queries, proposals, none.long(), known, 4)
    assert found.ids.tolist() == [[0, 2, 3, 1]]
    assert found.scores[0, 3].item() == -math.inf


def test_what_the_kernels_rank(triton_device, monkeypatch):
    table = table_of(torch.ones(4, W), triton_device)
    assert ranks(table, 120)
    assert not ranks(table, 121)  # with what is ranked beyond, more than a scan finds
    assert not ranks(table_of(torch.ones(4, W, dtype=torch.float64), triton_device), 1)
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    assert not ranks(table, 1)


@pytest.mark.usefixtures("device_engine")
def test_a_read_is_few_launches(triton_device, monkeypatch):
    pytest.importorskip("faiss")
    bank = MemoryBank(
        N, 8, index="IVF16,Flat", device=triton_device, background=False, exact_below=50
    )
    bank.write(ids_of(0, N, triton_device), clustered().to(triton_device))
    queries = clustered(4, seed=1).to(triton_device)
    bank.read(queries, K)
    bank.write(ids_of(0, 3, triton_device), clustered(3, seed=2).to(triton_device))
    with Launches(monkeypatch, bank.book.clock) as launches, torch.no_grad():
        bank.read(queries, K)
    searching = ["comparable_queries", "latest_entries", "ones", "scan_tiles", "find_rows"]
    assert [name for name in launches.names if name in searching] == searching
    assert launches.names.count("rank_proposals") == 1
    assert len(launches.names) == 15  # in torch's operations 111


@pytest.mark.usefixtures("device_engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 100])
def test_of_equal_buffered_rows_those_of_the_lowest_ids_are_found(triton_device, width, dtype):
    rows = torch.randn(60, width).to(dtype)
    rows[:30] = rows[0].clone()
    index = make(triton_device, "Flat", rows=rows, metric=Metric.ip, buffer_rows=100, exact_below=1)
    index.update(ids_of(0, 30, triton_device).flip(0), index.table.rows[:30].clone())
    queries = index.table.rows[:1].to(torch.float32)
    assert index.stats()["buffered"] == 30
    assert index.search(queries, 4).ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.usefixtures("device_engine")
def test_buffered_rows_whose_scores_are_no_numbers_are_found_by_id(triton_device):
    rows = torch.full((40, W), 3e38)
    rows[38:] = 1.0
    index = make(triton_device, "IVF1,SQ8", rows=torch.ones(40, W), metric=Metric.ip, exact_below=1)
    index.update(ids_of(0, 38, triton_device).flip(0), rows[:38].to(triton_device))
    queries = torch.tensor([[3e38, -3e38, 0, 0, 0, 0]], device=triton_device)
    assert index.search(queries, 6).ids.tolist() == [[38, 39, 0, 1, 2, 3]]


@pytest.mark.usefixtures("device_engine")
def test_kernels_are_launched_on_the_rows_device(triton_device, monkeypatch):
    """The current one may be another; a stand-in notes whether it was switched."""
    index = make(triton_device, "Flat", exact_below=1)
    index.update(ids_of(0, 3, triton_device), clustered(3, seed=1).to(triton_device))
    switched, launched, real = [], [], device_ranking.launch

    @contextlib.contextmanager
    def device_of(tensor):
        switched.append(tensor.device)
        yield
        switched.pop()

    def launch(program, *given, **constants):
        launched.append((program.__name__, switched[-1:]))
        real(program, *given, **constants)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (device_ranking, device_scan):
        monkeypatch.setattr(module, "launch", launch)
    index.search(clustered(2, seed=2).to(triton_device), K)
    assert {name for name, _ in launched} > {"rank_proposals", "latest_entries", "scan_tiles"}
    assert all(device == [index.table.rows.device] for _, device in launched)


class RankedWork(Work):
    """The work of every index's contract, where the kernels rank."""

    width = W


@pytest.mark.usefixtures("device_engine")
@pytest.mark.filterwarnings("ignore:upkeep of index")  # builds of too few rows, or made to fail
@settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), max_size=6),
    st.sampled_from([Metric.ip, Metric.l2]),
    st.builds(
        Manner,
        filled=st.sampled_from((3, 20, 40)),
        buffer_rows=st.sampled_from((3, LARGE_BUFFER)),
        steady=st.booleans(),
    ),
)
def test_the_contract_of_every_index(triton_device, operations, metric, manner):
    # All that is summed is exact in float32, so scores are compared as they are.
    pytest.importorskip("faiss")
    with triton_device:
        kind = DeviceKind("IVF4,Flat", exhaustive=True, ks=(1, 5))
        done = RankedWork(kind, metric, torch.float32, manner)
        for operation, seed in operations:
            done.apply(operation, seed)
