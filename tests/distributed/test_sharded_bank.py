"""A sharded bank trains as one bank does."""

import pytest
import torch
from torch import nn

from sparsemem import MemoryBank
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD, clip_grad_norm
from tests.oracles.sharded import sharded, whole

SHARDS = pytest.mark.parametrize("num_shards", [1, 3, 4])
WIDTH, VALUE_WIDTH = 6, 3


def pair(num_shards, num_rows=40, value_width=VALUE_WIDTH, **options):
    """One bank and a sharded one with the same rows."""
    given = (num_rows, WIDTH, value_width)
    banks = MemoryBank(*given, **options), sharded(num_shards, *given, **options)
    generator = torch.Generator().manual_seed(num_shards)
    rows = torch.randn(num_rows - 3, WIDTH, generator=generator)
    values = None
    if value_width is not None:
        values = torch.randn(num_rows - 3, value_width, generator=generator)
    for bank in banks:
        bank.append(rows, values)
    return banks


def loss_of(bank, query, target):
    hit = bank.read(query, 5)
    weights = hit.scores.mul(4).softmax(-1)
    return ((weights.unsqueeze(-1) * hit.values).sum(-2) - target).square().mean()


@SHARDS
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("value_width", [None, VALUE_WIDTH])
def test_gradients_are_those_of_one_bank(num_shards, metric, value_width):
    one, many = pair(num_shards, metric=metric, value_width=value_width)
    queries = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for bank in (one, many):
        asked = queries.clone().requires_grad_()
        hit = bank.read(asked, 5)
        (hit.scores.square().sum() + hit.rows.sin().sum() + hit.values.pow(3).sum()).backward()
        tables = [bank.keys] if value_width is None else [bank.keys, bank.values]
        results.append((*hit, asked.grad, *(table.grad.coalesce().to_dense() for table in tables)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "num_shards", "steps"),
    [
        (RowAdam, 4, 60),
        pytest.param(RowAdam, 4, 300, marks=pytest.mark.slow),
        (RowAdam, 1, 30),
        (RowSGD, 3, 30),
        (RowAdagrad, 3, 30),
        (RowAdamW, 3, 30),
    ],
)
@pytest.mark.usefixtures("plain_errors")  # in a quarter of the time
def test_training_gives_the_same_losses_and_rows(kind, num_shards, steps):
    one, many = pair(num_shards)
    start, generator = one.keys.detach().clone(), torch.Generator().manual_seed(3)
    data = torch.randn(steps, 8, WIDTH + VALUE_WIDTH, generator=generator)
    losses = []
    for bank in (one, many):
        torch.manual_seed(0)
        layer = nn.Linear(WIDTH, WIDTH)
        optimiser = kind([*layer.parameters(), bank.keys, bank.values], lr=0.05)
        own = []
        for batch in data:
            optimiser.zero_grad()
            query, target = batch.split([WIDTH, VALUE_WIDTH], 1)
            loss = loss_of(bank, layer(query), target)
            loss.backward()
            clip_grad_norm([*layer.parameters(), bank.keys, bank.values], 1.0)
            optimiser.step()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == losses[1]
    assert (one.keys != start).any(1).sum() > 30
    assert torch.equal(whole(many)[1], one.keys)


def test_frozen_rows_take_no_gradient():
    one, many = pair(3)
    for bank in (one, many):
        bank.freeze(torch.tensor([0, 1, 2, 3]))
        loss_of(bank, torch.ones(2, WIDTH), torch.ones(2, VALUE_WIDTH)).backward()
        RowSGD([bank.keys, bank.values], lr=1.0).step()
    assert torch.equal(whole(many)[1], one.keys)
    assert torch.equal(one.keys.grad.to_dense(), many.keys.grad.to_dense())
    assert not many.keys.grad.to_dense()[:4].any()


def test_a_row_written_before_the_backward_pass_takes_no_gradient():
    _, many = pair(3)
    hit = many.read(torch.ones(1, WIDTH), 3)
    other = int(hit.ids[0, 1])
    many.write(torch.tensor([other]), torch.ones(1, WIDTH))
    hit.scores.sum().backward()
    touched = set(many.keys.grad.coalesce().indices()[0].tolist())
    assert touched == set(hit.ids[0].tolist()) - {other}


def test_other_optimisers_are_refused():
    _, many = pair(3)
    many.read(torch.ones(1, WIDTH), 3).scores.sum().backward()
    with pytest.raises(TypeError, match="SGD cannot step the rows of a sharded bank"):
        torch.optim.SGD([many.keys], lr=0.1).step()


def test_what_was_saved_comes_back_and_what_came_later_too():
    _, bank = pair(3)
    optimiser = RowAdam([bank.keys, bank.values], lr=0.1)

    def step(seed):
        optimiser.zero_grad()
        query = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
        loss_of(bank, query, torch.zeros(4, VALUE_WIDTH)).backward()
        optimiser.step()

    step(1)
    bank.save()
    saved = whole(bank)[1].clone()
    step(2)
    removed = bank.remove(torch.tensor([5, 9]))
    assert removed.tolist() == [5, 9]
    later = whole(bank)[1].clone()
    assert not torch.equal(saved, later)
    bank.close()
    again = ShardedBank(bank.path, LocalShards(bank.path))
    assert torch.equal(whole(again)[1], later)
    assert not whole(again)[0].live[[5, 9]].any()
    again.restore()
    assert torch.equal(whole(again)[1], saved)
    assert whole(again)[0].live[[5, 9]].all()
    again.close()


def test_an_append_goes_elsewhere_where_somebody_was_faster():
    _, bank = pair(3)
    other = ShardedBank(bank.path, bank.shards)  # another caller of the same shards
    offered = bank._ask

    def late(operation, arguments):
        answer = offered(operation, arguments)
        if operation == "offer":
            bank._ask = offered
            assert other.append(torch.zeros(2, WIDTH)).tolist() == [37, 38]
        return answer

    bank._ask = late
    ids = bank.append(torch.ones(2, WIDTH))
    assert len(set(ids.tolist()) | {37, 38}) == 4
    book, keys = whole(bank)
    assert book.live.all()
    assert keys[ids].eq(1).all()
    assert keys[[37, 38]].eq(0).all()


def test_shards_of_another_bank_are_refused(tmp_path):
    _, bank = pair(3)
    path = ShardedBank.create(tmp_path / "bank", 10, 2, num_shards=2)
    with pytest.raises(ValueError, match="shards are 3, expected 2"):
        ShardedBank(path, bank.shards)


def test_a_gradient_that_the_wire_cannot_hold_steps_no_shard():
    _, whole_wire = pair(3)
    bank = ShardedBank(whole_wire.path, whole_wire.shards, wire_dtype=torch.float16)
    before = whole(bank)[1].clone()
    (bank.read(torch.ones(1, WIDTH), 6).scores.sum() * 1e6).backward()
    with pytest.raises(ValueError, match=r"the gradient of keys in torch.float16\[.*\] is -?inf"):
        RowSGD([bank.keys], lr=1e-9).step()
    assert torch.equal(whole(bank)[1], before)


@pytest.mark.gpu
def test_queries_may_be_on_a_gpu():
    found = []
    for device in ("cpu", "cuda"):
        bank = sharded(2, 20, 4, initial="normal")
        queries = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device)
        queries.requires_grad_()
        hit = bank.read(queries, 5)
        assert hit.rows.device.type == hit.ids.device.type == device
        (hit.scores.square().sum() + hit.values.sin().sum()).backward()
        assert bank.keys.grad.device.type == "cpu"
        found.append([queries.grad.cpu(), bank.keys.grad.to_dense(), hit.scores.detach().cpu()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
