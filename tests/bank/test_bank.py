"""What a read gives, and its gradients, against dense torch."""

import threading

import pytest
import torch
from torch.func import functional_call

from sparsemem import MemoryBank
from sparsemem.indexes.metrics import Metric
from tests.oracles.sharded import makers, rows_of_tables, whole

METRICS = ["cosine", "ip", "l2"]
MAKERS, SOME_MAKERS = makers(1, 3, 4), makers(3)


def rows_of(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(make=MemoryBank, num_rows=9, width=4, value_width=3, **options):
    bank = make(num_rows, width, value_width, **{"dtype": torch.float64, **options})
    values = None if value_width is None else rows_of(num_rows, value_width, seed=2)
    bank.append(rows_of(num_rows, width), values)
    return bank


def dense_scores(queries, keys, metric):
    if metric == "l2":
        return (queries.unsqueeze(-2) - keys).square().sum(-1)
    product = queries @ keys.mT
    if metric == "ip":
        return product
    lengths = [(rows.square().sum(-1) + 1e-6).sqrt() for rows in (queries, keys)]
    return product / lengths[0].unsqueeze(-1) / lengths[1]


class Dense(torch.autograd.Function):
    """The same tensor; its gradient, which must come in sparse, goes out dense."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        assert gradient.is_sparse
        return gradient.to_dense()


@MAKERS
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value_width", [None, 3])
def test_reading_all_rows_is_dense_attention(make, metric, value_width):
    bank = filled(make, metric=metric, value_width=value_width)
    queries = rows_of(5, 2, 4, seed=5).requires_grad_()
    copies = [table.clone().requires_grad_() for table in rows_of_tables(bank)]
    hit = bank.read(queries, 9)
    sign = Metric(metric).sign
    found = ((sign * hit.scores).softmax(-1).unsqueeze(-1) * hit.values).sum(-2)
    expected = (sign * dense_scores(queries, copies[0], metric)).softmax(-1) @ copies[-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    weights = rows_of(*expected.shape, seed=6)
    gradients = torch.autograd.grad((found * weights).sum(), [queries, *bank.tables])
    wanted = torch.autograd.grad((expected * weights).sum(), [queries, *copies])
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.to_dense(), want, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:keys were changed in place")  # by finite differences
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value_width", [None, 3])
def test_gradients_equal_finite_differences(metric, value_width):
    bank = filled(metric=metric, value_width=value_width)
    names = [name for name, _ in bank.named_parameters()]

    def read(queries, *tables):
        dense = {name: Dense.apply(table) for name, table in zip(names, tables, strict=True)}
        hit = functional_call(bank, dense, (queries, 3))
        return hit.scores, hit.values, hit.rows

    queries = rows_of(2, 4, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(read, (queries, *bank.tables))


@SOME_MAKERS
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_the_indexs_bit_for_bit(make, metric, dtype):
    bank, one = (kind(300, 24, metric=metric, dtype=dtype) for kind in (make, MemoryBank))
    for each in (bank, one):
        each.append(rows_of(300, 24).to(dtype))
    for count in (1, 7, 64):
        queries = rows_of(count, 24, seed=3).to(bank.computing_dtype)
        for k in (1, 5, 300):
            hit, found = bank.read(queries, k), one.index.search(queries, k)
            assert torch.equal(hit.scores.detach(), found.scores)
            assert torch.equal(hit.ids, found.ids)


@MAKERS
def test_shapes_of_queries_carry_over(make):
    bank = filled(make)
    for shape in [(), (1,), (0,), (2, 3), (2, 0, 3)]:
        hit = bank.read(rows_of(*shape, 4), 2)
        assert hit.ids.shape == hit.scores.shape == (*shape, 2)
        assert hit.rows.shape == (*shape, 2, 4)
        assert hit.values.shape == (*shape, 2, 3)
    one, many = bank.read(rows_of(4), 2), bank.read(rows_of(4).expand(2, 3, 4), 2)
    assert torch.equal(many.rows, one.rows.expand(2, 3, 2, 4))


@MAKERS
def test_tied_values_are_the_rows(make):
    hit = filled(make, value_width=None).read(rows_of(2, 4), 3)
    assert hit.values is not None
    assert torch.equal(hit.values, hit.rows)


@MAKERS
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_missing_has_no_id_zeros_and_the_worst_score(make, metric):
    bank = make(5, 4, 3, metric=metric, dtype=torch.float64)
    worst = torch.inf if metric == "l2" else -torch.inf
    queries = rows_of(2, 4).requires_grad_()
    hit = bank.read(queries, 5)
    assert hit.ids.tolist() == [[-1] * 5] * 2
    assert hit.scores.tolist() == [[worst] * 5] * 2
    assert not hit.rows.any()
    assert not hit.values.any()
    bank.append(rows_of(2, 4), rows_of(2, 3))
    hit = bank.read(queries, 5)
    assert hit.ids[:, 2:].tolist() == [[-1] * 3] * 2
    (hit.values.sum() + hit.rows.sum() + hit.scores[:, :2].sum()).backward()
    assert queries.grad.isfinite().all()
    assert set(bank.keys.grad.coalesce().indices().flatten().tolist()) == {0, 1}
    assert bank.keys.grad.to_dense().isfinite().all()


@SOME_MAKERS
def test_repeated_rows_add_up_their_gradients(make):
    bank = filled(make, metric="ip")
    query = rows_of(4)
    hit = bank.read(query.expand(6, 4), 2)
    weights = rows_of(6, 2, seed=8)
    (hit.values.sum(-1) * weights).sum().backward()
    gradient = bank.values.grad.to_dense()
    for place, row in enumerate(hit.ids[0].tolist()):
        assert torch.allclose(gradient[row], weights[:, place].sum().expand(3))
    assert gradient.count_nonzero() == 2 * 3
    assert bank.values.grad._nnz() <= 12


@SOME_MAKERS
def test_gradients_accumulate_over_reads(make):
    bank, together = filled(make), filled(make)
    queries = rows_of(2, 3, 4)
    for part in queries:
        bank.read(part, 2).values.sum().backward()
    together.read(queries, 2).values.sum().backward()
    assert bank.values.grad.is_sparse
    assert torch.equal(bank.values.grad.to_dense(), together.values.grad.to_dense())


def rows_with_gradient(bank):
    return bank.values.grad.coalesce().indices().flatten().tolist()


@MAKERS
def test_rows_that_went_before_the_backward_pass_get_no_gradient(make):
    bank = filled(make)
    loss = bank.read(rows_of(4), 9).values.sum()
    bank.freeze(torch.tensor([0]))
    bank.remove(torch.tensor([1, 2]))
    assert bank.append(rows_of(1, 4), rows_of(1, 3)).tolist() == [1]  # another row
    bank.write(torch.tensor([3]), rows_of(1, 4))
    bank.write(torch.tensor([4]), tags=1)  # the same row
    loss.backward()
    assert rows_with_gradient(bank) == [4, 5, 6, 7, 8]
    bank.unfreeze()
    bank.values.grad = None
    bank.read(rows_of(4), 9).values.sum().backward()
    assert rows_with_gradient(bank) == [0, 1, 3, 4, 5, 6, 7, 8]


@SOME_MAKERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_computed_with_in_float32(make, dtype):
    keys, values = rows_of(9, 4).to(dtype), rows_of(9, 3, seed=2).to(dtype)
    bank, single = (make(9, 4, 3, dtype=kind) for kind in (dtype, torch.float32))
    for each in (bank, single):
        each.append(keys, values)
    queries = rows_of(200, 4).float()
    hits = [each.read(queries, 3) for each in (bank, single)]
    for part, want in zip(*hits, strict=True):
        assert part.dtype == want.dtype
        assert torch.equal(part, want)
    for hit in hits:
        (hit.values.sum() + hit.scores.sum()).backward()
    for table, want in zip(bank.tables, single.tables, strict=True):
        assert table.grad.dtype == dtype
        # Summed in float32 and rounded once.
        assert torch.equal(table.grad.to_dense(), want.grad.to_dense().to(dtype))


@SOME_MAKERS
def test_autocast_and_half_queries_change_nothing_in_the_arithmetic(make):
    bank = make(9, 4)
    bank.append(rows_of(9, 4))
    queries = rows_of(5, 4).bfloat16()
    expected = bank.read(queries.float(), 3)
    leaf = queries.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hit = bank.read(leaf, 3)
    assert torch.equal(hit.scores, expected.scores)
    assert hit.scores.dtype == hit.rows.dtype == torch.float32
    hit.scores.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.any()


@MAKERS
def test_a_read_is_one_call_and_an_access_of_each_row_found(make):
    bank = make(4, 2, metric="ip", dtype=torch.float64)
    bank.append(torch.eye(2, dtype=torch.float64))
    bank.read(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double(), 1)
    bank.read(torch.tensor([1.0, 0.0]).double(), 4)
    assert bank.stats()["clock"] == 3
    assert whole(bank)[0].accesses.tolist() == [1 + 2 + 1, 1 + 1 + 1, 0, 0]
    assert whole(bank)[0].last_access.tolist() == [3, 3, 0, 0]
    bank.read(torch.tensor([0.0, 1.0]).double(), 1)
    assert whole(bank)[0].last_access.tolist() == [3, 4, 0, 0]


@SOME_MAKERS
def test_initial_rows_are_normal_and_the_same_for_a_seed(make):
    bank = make(4000, 16, 8, initial="normal", seed=3)
    assert bank.stats()["num_live"] == 4000
    keys, values = rows_of_tables(bank)
    assert keys.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    assert values.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    again = make(4000, 16, 8, initial="normal", seed=3, dtype=torch.bfloat16)
    assert torch.equal(rows_of_tables(again)[0], keys.bfloat16())
    one = MemoryBank(4000, 16, 8, initial="normal", seed=3)
    assert all(map(torch.equal, rows_of_tables(one), (keys, values)))
    other = make(4000, 16, 8, initial="normal", seed=4)
    assert not torch.equal(rows_of_tables(other)[0], keys)
    # Rows that were there from the start and went count as removed ones.
    bank.remove(torch.tensor([7, 5]))
    assert bank.append(rows_of(3, 16)).tolist() == [5, 7, 0]


@SOME_MAKERS
def test_new_rows_without_values_have_zeros(make):
    bank = filled(make)
    bank.remove(torch.tensor([2, 4]))
    bank.write(torch.tensor([1, 2]), rows_of(2, 4))
    values = rows_of_tables(bank)[1]
    assert not values[2].any()
    assert torch.equal(values[1], rows_of(9, 3, seed=2)[1])  # an old one keeps its own
    assert bank.append(rows_of(1, 4)).tolist() == [4]
    assert not rows_of_tables(bank)[1][4].any()


def test_stats_are_those_of_bank_and_index():
    bank = filled()
    bank.freeze(torch.tensor([1, 2]))
    stats = bank.stats()
    book = sum(buffer.nbytes for buffer in bank.book.buffers())
    assert stats["table_bytes"] == 9 * (4 + 3) * 8 + book
    assert (stats["num_rows"], stats["num_live"], stats["num_frozen"]) == (9, 9, 2)
    assert bank.index.stats().items() <= stats.items()


def test_readers_and_writers_in_threads_see_whole_rows():
    """Every row is one number repeated, and its value that number: a torn row would differ."""
    bank = MemoryBank(64, 8, 1, metric="l2")
    errors, stop = [], threading.Event()

    def write(start):
        number = start
        while not stop.is_set():
            number += 2
            rows = torch.full((3, 8), float(number % 1000))
            ids = bank.append(rows, rows[:, :1], ttl=5)
            bank.remove(ids[:1])

    def read():
        for _ in range(150):
            hit = bank.read(torch.randn(4, 8), 5)
            same = (hit.rows == hit.values).all()
            if not same:
                errors.append(hit)

    def guard(work, *args):
        try:
            work(*args)
        except Exception as error:
            errors.append(error)

    readers = [threading.Thread(target=guard, args=(read,)) for _ in range(2)]
    writers = [threading.Thread(target=guard, args=(write, start)) for start in (0, 1)]
    for thread in readers + writers:
        thread.start()
    for thread in readers:
        thread.join(60)
    stop.set()
    for thread in writers:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in readers + writers)
    assert bank.table.num_live == int(bank.book.live.count_nonzero())
