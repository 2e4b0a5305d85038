"""Product keys over shards are those of one bank: what is read, learned, written and kept."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsemem import MemoryBank
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.product_keys import ShardedProductKeys
from sparsemem.distributed.transport import LocalShards
from sparsemem.layers import MemoryLayer
from sparsemem.optim import RowAdamW, clip_grad_norm
from tests.oracles.product_keys import (
    VALUE_WIDTH,
    WIDTH,
    N,
    check_same,
    pair,
    random,
    read_both,
)
from tests.oracles.sharded import rows_of_tables, sharded

SHARDS = pytest.mark.parametrize("num_shards", [1, 3, 4])


@SHARDS
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("initial", ["normal", "empty"])
def test_reads_and_gradients_are_those_of_one_bank(num_shards, metric, initial):
    banks = pair(num_shards, metric=metric, initial=initial, seed=3)
    check_same(*banks)
    results = []
    for bank in banks:
        asked = random(2, 7, WIDTH).requires_grad_()
        hit = bank.read(asked, 5)
        of_values = (hit.values + 1).pow(3).sum()
        (hit.scores.square().sum() + hit.rows.sin().sum() + of_values).backward()
        assert not bank.keys.grad.is_sparse
        values = bank.values.grad.coalesce()
        results.append((*hit, asked.grad, bank.keys.grad, values.indices(), values.values()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert results[0][0].shape == (2, 7, 5, WIDTH)
    check_same(*banks)  # accesses and clock, too


@SHARDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes(num_shards, dtype):
    banks = pair(num_shards, dtype=dtype)
    check_same(*banks)
    hit, _ = read_both(banks, random(4, WIDTH, dtype=torch.float64))
    assert hit.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


class Net(nn.Module):
    """Two layers over one bank, as the character model may have them."""

    def __init__(self, bank):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MemoryLayer(4, bank, 2, 3) for _ in range(2))

    def loss(self, output, target):
        for layer in self.layers:
            output = output + layer(output)
        return (output - target).square().mean()


def groups(model):
    """The character model's: values have a learning rate of their own, and do not decay."""
    named = dict(model.named_parameters())
    values = [x for name, x in named.items() if name.endswith("bank.values")]
    rest = [x for name, x in named.items() if not name.endswith("bank.values")]
    assert len(values) == 1
    assert any(name.endswith("bank.keys") for name in named)
    return [
        {"params": rest, "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1},
        {"params": values, "lr": 0.1, "weight_decay": 0.0},
    ]


@SHARDS
@pytest.mark.usefixtures("plain_errors")  # in a quarter of the time
def test_training_gives_the_same_losses_and_rows(num_shards):
    banks, losses = pair(num_shards, initial="empty"), []
    before = banks[0].keys.detach().clone()
    for bank in banks:
        model = Net(bank)
        optimiser = RowAdamW(groups(model))
        own = []
        for step in range(20):
            loss = model.loss(random(2, 3, 4, seed=step), random(2, 3, 4, seed=100 + step))
            loss.backward()
            clip_grad_norm(model.parameters(), 0.3)
            optimiser.step()
            optimiser.zero_grad()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]
    assert not torch.equal(before, banks[1].keys)
    assert rows_of_tables(banks[1])[0].any(1).sum() > 10
    check_same(*banks)


@pytest.mark.parametrize("rounding_seed", [None, 3])
def test_a_step_that_was_cut_short_is_made_again_and_happens_once(rounding_seed, monkeypatch):
    _, whole = pair(3, dtype=torch.bfloat16)
    _, cut = pair(3, dtype=torch.bfloat16)
    answer, fails = LocalShards._answer, [2]

    def failing(shards, shard, call):
        if shards is cut.shards and call.operation == "step" and shard == 2 and fails:
            raise ShardError(f"shard {fails.pop()} is slow")
        return answer(shards, shard, call)

    monkeypatch.setattr(LocalShards, "_answer", failing)
    for bank in (whole, cut):
        optimiser = RowAdamW([bank.keys, bank.values], lr=1e-3, rounding_seed=rounding_seed)
        before = bank.keys.detach().clone()
        for _ in range(2):
            optimiser.zero_grad()
            hit = bank.read(random(9, WIDTH), 4)
            (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum(-2).square().sum().backward()
            if fails and bank is cut:
                with pytest.raises(ShardError, match="shard 2 is slow"):
                    optimiser.step()
                assert torch.equal(before, bank.keys)
            optimiser.step()
        assert not torch.equal(before, bank.keys)
    assert not fails
    check_same(whole, cut)


@SHARDS
def test_writing_freezing_and_tags(num_shards):
    banks = pair(num_shards)
    for bank in banks:
        bank.write(torch.tensor([7, 2, 24]), values=random(3, VALUE_WIDTH), tags=5)
        bank.freeze(torch.tensor([2, 3]))
        bank.write(torch.tensor([4]), tags=6)
        hit = bank.read(random(9, WIDTH), 6)
        hit.values.sum().backward()
        bank.write(torch.tensor([8]), values=torch.ones(1, VALUE_WIDTH))
        assert bank.tags_of(torch.tensor([2, 4, -1, 0])).tolist() == [5, 6, 0, 0]
        assert bank.capacity() == N - 2
    grads = [bank.values.grad.to_dense() for bank in banks]
    assert torch.equal(*grads)
    assert not grads[0][[2, 3, 8]].any()
    assert grads[0].any()
    check_same(*banks)


@SHARDS
def test_rows_that_go_and_come_back(num_shards):
    banks, queries = pair(num_shards), random(9, WIDTH)
    best = read_both(banks, queries, 1)[0].ids.unique()
    for bank in banks:
        assert torch.equal(bank.remove(best), best)
    hit, _ = read_both(banks, queries, N)
    assert not torch.isin(hit.ids, best).any()
    assert (hit.ids < 0).sum() == len(best) * len(queries)
    for bank in banks:
        bank.write(best[:1], tags=3, ttl=2)  # its value is zeros now
    hit, _ = read_both(banks, queries)
    assert not hit.values[hit.ids == best[0]].any()
    assert (hit.ids == best[0]).any()
    for _ in range(2):  # and its time goes by
        hit, _ = read_both(banks, queries)
    assert not (hit.ids == best[0]).any()
    for bank in banks:
        bank.write(best, values=random(len(best), VALUE_WIDTH))
    hit, _ = read_both(banks, queries)
    assert torch.equal(hit.ids[:, 0].unique(), best)
    check_same(*banks)


def test_a_time_that_is_over_at_the_very_write():
    banks = pair(3)
    for bank in banks:
        bank.write(torch.tensor([4]), values=torch.ones(1, VALUE_WIDTH), ttl=1)
        bank.write(torch.tensor([5]), tags=1)
        bank.write(torch.tensor([4]), tags=2)
    read_both(banks, random(9, WIDTH), N)
    check_same(*banks)


def test_what_another_client_removes_is_not_found():
    _, bank = pair(3)
    other = ShardedProductKeys(bank.path, bank.shards)
    best = bank.read(random(1, WIDTH), 1).ids[0]
    other.remove(best)
    assert bank.read(random(1, WIDTH), 1).ids[0] != best
    other.write(best, values=torch.ones(1, VALUE_WIDTH))
    assert torch.equal(bank.read(random(1, WIDTH), 1).values[0], torch.ones(1, VALUE_WIDTH))


@SHARDS
def test_selected_rows_alone_are_trained(num_shards):
    banks = pair(num_shards)
    for bank in banks:
        with bank.background():
            bank.read(random(6, WIDTH, seed=2), 3)
        hit = bank.read(random(5, WIDTH), 3)
        selected = bank.select(top=4)
        hit.values.sum().backward()
        rows = bank.values.grad.coalesce().indices()[0]
        assert torch.equal(rows, selected)
    assert torch.equal(*(bank.select(top=4) for bank in banks))
    check_same(*banks)


IDS = st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True).map(torch.tensor)
CALLS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 5), st.integers(1, 9)),
    st.tuples(st.just("step"), st.integers(0, 5)),
    st.tuples(
        st.just("write"),
        IDS,
        st.booleans(),
        st.sampled_from([None, 0, 2]),
        st.sampled_from([None, 1]),
    ),
    st.tuples(st.sampled_from(["remove", "freeze", "unfreeze"]), IDS),
    st.tuples(st.just("select"), st.sampled_from([None, 3])),
)


def done(bank, optimiser, name, *what):
    """What comes of a call: tensors, or why it was refused."""
    try:
        if name == "read":
            return list(bank.read(random(2, 4, seed=what[0]), what[1]))
        if name == "step":
            optimiser.zero_grad()
            bank.read(random(2, 4, seed=what[0]), 3).values.square().sum().backward()
            return [optimiser.step()]
        if name == "select":
            return [bank.select(None if what[0] is None else "tf-idf", what[0])]
        if name == "write":
            ids, has_values, ttl, tags = what
            values = random(len(ids), VALUE_WIDTH, seed=len(ids)) if has_values else None
            return [bank.write(ids, values=values, ttl=ttl, tags=tags)]
        return [getattr(bank, name)(*what)]
    except ValueError as error:
        return [str(error)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(CALLS, min_size=5, max_size=20))
def test_any_calls_come_to_the_same(calls):
    banks = [make(9, 4, VALUE_WIDTH, index="product-key", metric="ip", initial="normal")
             for make in (MemoryBank, partial(sharded, 2))]  # fmt: skip
    optimisers = [RowAdamW([bank.values], lr=0.1) for bank in banks]
    for call in calls:
        ours, theirs = (done(*each, *call) for each in zip(banks, optimisers, strict=True))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        if call[0] in ("read", "step"):  # else shards without such rows have not heard the time
            check_same(*banks)
    for bank in banks:
        bank.expire()
    check_same(*banks)
    banks[1].close()


def test_a_bank_with_product_keys_refuses_the_same(plain_errors):
    for bank in pair(2):
        ids, rows = torch.tensor([0]), torch.zeros(1, WIDTH)
        with pytest.raises(ValueError, match="append is not for product keys: their rows are all"):
            bank.append(rows)
        with pytest.raises(ValueError, match="rows is given, expected None with product keys: th"):
            bank.write(ids, rows)
        with pytest.raises(ValueError, match=r"values has shape \[1, 6\], expected \[1, 3\]"):
            bank.write(ids, values=rows)
        with pytest.raises(ValueError, match="nothing to write, expected rows, values, tags or"):
            bank.write(ids)
        with pytest.raises(ValueError, match=r"queries has shape \[2, 5\], expected \[..., 6\]"):
            bank.read(torch.zeros(2, 5), 1)


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 24}, "num_rows is 24, expected a perfect square"),
        ({"width": 5}, "width is 5, expected an even one"),
        ({"value_width": None}, "value_width is None, expected a width"),
        ({"metric": "cosine"}, "metric is 'cosine', expected 'ip' or 'l2'"),
        ({"background": False}, "background"),
        ({"dtype": torch.int8}, r"dtype is torch.int8, expected one of"),
    ],
)
def test_what_makes_no_product_keys_is_refused_as_by_one_bank(options, message, tmp_path):
    sizes = {"num_rows": N, "width": WIDTH, "value_width": VALUE_WIDTH}
    for make in (MemoryBank, partial(ShardedBank.create, tmp_path / "x", num_shards=2)):
        with pytest.raises((ValueError, TypeError), match=message):
            make(index="product-key", **{"metric": "ip", **sizes, **options})
    assert not list(tmp_path.iterdir())


def test_each_kind_of_folder_has_its_class(tmp_path):
    _, bank = pair(2)
    with pytest.raises(ValueError, match=r"indexed by product keys, expected ShardedProductKeys"):
        ShardedBank(bank.path, bank.shards)
    path = ShardedBank.create(tmp_path / "plain", N, WIDTH, num_shards=2)
    with pytest.raises(ValueError, match=r"has no product keys, expected ShardedBank\(path, shard"):
        ShardedProductKeys(path, LocalShards(path))


def test_workers_step_the_mean_and_have_the_same_sub_keys():
    one, bank = pair(3)
    with torch.no_grad():
        for each in (one, bank):
            each.keys.mul_(1.5)
    workers = [bank.as_worker(worker, 2) for worker in range(2)]
    assert all(torch.equal(worker.keys, bank.keys) for worker in workers)
    for each in (one, *workers):
        hit = each.read(random(4, WIDTH), 3)
        hit.values.sum().backward()
    for each in (one, *workers):
        RowAdamW([each.values], lr=0.1).step()
    assert torch.equal(rows_of_tables(bank)[0], one.values)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        bank.__getstate__()


def test_what_it_prints_and_counts():
    _, bank = pair(3)
    assert "25, 6, 3, index='product-key', metric='ip', num_shards=3" in repr(bank)
    bank.remove(torch.tensor([3]))
    assert bank.stats()["num_live"] == N - 1
    assert not MemoryLayer(4, bank, 1, 2).state_dict().keys() & {"bank.keys", "bank.values"}
