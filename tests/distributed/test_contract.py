"""What a bank promises beyond its own tests, over shards: layers, refusals, kinds of indices."""

import copy
import pickle
from functools import partial
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsemem import MemoryBank
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.traffic import Traffic, wire_bytes
from sparsemem.layers import LifelongMemory, MemoryLayer
from sparsemem.memory.episode import Episode
from sparsemem.optim import RowAdam, RowSGD
from tests.oracles.sharded import rows_of_tables, sharded, snapshot, whole

WIDTH = 6


def rows_of(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_memory_layer_over_shards_is_one_over_a_bank():
    outputs, grads = [], []
    for make in (MemoryBank, partial(sharded, 3)):
        bank = make(50, WIDTH, 4, metric="ip")
        bank.append(rows_of(45, WIDTH), rows_of(45, 4, seed=2))
        torch.manual_seed(0)
        layer = MemoryLayer(8, bank, num_heads=2, top_k=5)
        output = layer(rows_of(3, 4, 8, seed=3))
        output.square().sum().backward()
        outputs.append(output)
        grads.append([parameter.grad.to_dense() for parameter in layer.parameters()])
    assert torch.equal(*outputs)
    for one, many in zip(*grads, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-7)  # bank.keys.grad: order


def test_a_lifelong_memory_over_shards_learns_what_one_over_a_bank_does():
    memories = [
        LifelongMemory(make(20, WIDTH), top_k=3) for make in (MemoryBank, partial(sharded, 3))
    ]
    queries, labels = rows_of(60, WIDTH), torch.arange(60) % 7
    for query, label in zip(queries.split(4), labels.split(4), strict=True):
        recalls = [memory(query) for memory in memories]
        assert all(map(torch.equal, *recalls))
        ids = [memory.remember(query, label) for memory in memories]
        assert torch.equal(*ids)
    assert torch.equal(*(memory.forget(3) for memory in memories))
    states = [snapshot(memory.bank) for memory in memories]
    assert all(map(torch.equal, *states))


def test_what_is_no_bank_is_refused(plain_errors):
    with pytest.raises(TypeError, match="bank is a Linear, expected a MemoryBank or a ShardedBank"):
        MemoryLayer(8, nn.Linear(2, 2))
    bank = sharded(2, 10, WIDTH)
    with pytest.raises(TypeError, match="bank is a ShardedBank, expected a MemoryBank"):
        Episode.over(bank, 2)


def test_gather_is_differentiable_and_no_access():
    banks = MemoryBank(20, WIDTH), sharded(3, 20, WIDTH)
    ids, results = torch.tensor([[3, -1], [7, 3]]), []
    for bank in banks:
        bank.append(rows_of(15, WIDTH))
        rows = bank.gather(ids)
        bank.write(torch.tensor([7]), rows_of(1, WIDTH, seed=4))
        (rows * rows_of(2, 2, WIDTH, seed=5)).sum().backward()
        results.append((rows, bank.keys.grad.to_dense()))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)
    assert results[1][1][7].count_nonzero() == 0
    assert all(map(torch.equal, *map(snapshot, banks)))


def test_a_state_dict_has_no_rows_and_takes_none():
    bank = sharded(3, 20, WIDTH)
    bank.append(rows_of(15, WIDTH))
    layer = MemoryLayer(8, bank, num_heads=1, top_k=2)
    state = layer.state_dict()
    assert not any(name.startswith("bank.") for name in state)
    layer.load_state_dict(state)
    assert torch.equal(rows_of_tables(bank)[0][:15], rows_of(15, WIDTH))
    with pytest.raises(RuntimeError, match=r"bank\.book\.accesses is given, but the rows of a sh"):
        layer.load_state_dict(MemoryLayer(8, MemoryBank(20, WIDTH), 1, 2).state_dict())


def test_copies_and_moves_are_refused():
    bank = sharded(3, 20, WIDTH)
    layer = MemoryLayer(8, bank, num_heads=1, top_k=2)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(bank)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(layer)
    for moved in (layer.half, layer.double, partial(layer.to, "meta")):
        with pytest.raises(ValueError, match=r"cannot turn torch.float32 on cpu into"):
            moved()
    assert layer.to("cpu").float().bank is bank
    assert sum(parameter.numel() for parameter in bank.parameters()) == 20 * WIDTH


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows is 0, expected at least 1"),
        ({"width": 0}, "width is 0, expected at least 1"),
        ({"metric": "cosinus"}, "metric is 'cosinus', did you mean 'cosine'"),
        ({"dtype": torch.int8}, r"dtype is torch.int8, expected one of torch.float32, "),
        ({"initial": "zero"}, "initial is 'zero', known: empty, normal"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"min_recall": 1.5}, "min_recall is 1.5, expected a number from 0 to 1"),
        ({"nprobe": 3}, "unknown option 'nprobe' of index 'exact'"),
        ({"storage": "/tmp/x"}, "storage is given, expected none: a shard's rows are in its mem"),
        ({"num_shards": 7}, "num_shards is 7, expected at most num_rows = 6"),
    ],
)
def test_construction(options, message, tmp_path):
    given = {"num_rows": 6, "width": 4, "num_shards": 2, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        ShardedBank.create(tmp_path / "bank", **given)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("plain_errors")
def test_arguments_of_a_client():
    bank = sharded(2, 10, WIDTH)
    for options, message in (
        ({"worker": 2, "num_workers": 2}, "worker is 2, expected at most num_workers - 1 = 1"),
        ({"num_workers": 0}, "num_workers is 0, expected at least 1"),
        ({"wire_dtype": torch.bfloat16}, "wire_dtype is torch.bfloat16, expected torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardedBank(bank.path, bank.shards, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tables_train_as_one_banks(dtype):
    results = []
    for make in (MemoryBank, partial(sharded, 3)):
        bank = make(30, WIDTH, dtype=dtype)
        bank.append(rows_of(30, WIDTH))
        optimiser = RowAdam([bank.keys], lr=0.05, rounding_seed=None)
        for seed in range(10):
            optimiser.zero_grad()
            bank.read(rows_of(5, WIDTH, seed=seed), 4).rows.square().sum().backward()
            optimiser.step()
        results.append(rows_of_tables(bank)[0])
    assert results[1].dtype == dtype
    assert torch.equal(*results)


def test_float16_on_the_wire_rounds_rows_and_gradients():
    bank, exact = (sharded(3, 30, WIDTH, wire_dtype=kind) for kind in (torch.float16, None))
    hits = []
    for each in (bank, exact):
        each.append(rows_of(30, WIDTH))
        hits.append(each.read(rows_of(5, WIDTH, seed=2), 4))
        hits[-1].rows.sin().sum().backward()
        RowSGD([each.keys], lr=1.0).step()
    assert torch.equal(hits[0].ids, hits[1].ids)
    assert torch.equal(hits[0].scores, hits[1].scores)
    assert torch.equal(hits[0].rows, hits[1].rows.half().float())
    rows = [rows_of_tables(each)[0] for each in (bank, exact)]
    assert 0 < (rows[0] - rows[1]).abs().max() < 0.02


def test_each_shard_has_an_index_of_its_own():
    pytest.importorskip("faiss")
    options = {"index": "IVF4,Flat", "background": False, "exact_below": 8, "min_recall": 0.9}
    bank, exact = sharded(3, 3000, WIDTH, **options), MemoryBank(3000, WIDTH)
    for each in (bank, exact):
        each.append(rows_of(2900, WIDTH))
    queries = rows_of(200, WIDTH, seed=2)
    hits = [each.read(queries, 5) for each in (bank, exact)]
    shared = (hits[0].ids.unsqueeze(2) == hits[1].ids.unsqueeze(1)).any(2).float().mean()
    assert shared > 0.9
    stats = bank.stats()
    assert [shard["exact"] for shard in stats["shards"]] == [False] * 3
    assert stats["recall"] == min(shard["recall"] for shard in stats["shards"])
    assert stats["num_live"] == 2900


def test_a_second_client_sees_what_the_first_did_and_its_gradients_count():
    """Clocks are Lamport's: a late client's reads come after the writes that they see."""
    bank = sharded(3, 12, WIDTH)
    for seed in range(5):
        bank.append(rows_of(2, WIDTH, seed=seed))
    late = ShardedBank(bank.path, bank.shards.another())
    late.clock = 0  # as one that has asked nothing yet
    late.read(rows_of(2, WIDTH), 4).rows.sum().backward()
    assert late.clock == 5
    assert late.keys.grad.coalesce()._nnz() >= 4
    ids = late.append(rows_of(1, WIDTH), ttl=2)
    for _ in range(3):
        assert ids[0] in bank.read(rows_of(1, WIDTH), 12).ids
    late.read(rows_of(1, WIDTH), 1)  # told how late it is
    assert ids[0] not in late.read(rows_of(1, WIDTH), 12).ids


def test_gradients_of_rows_that_another_client_wrote_meanwhile_are_dropped():
    bank = sharded(3, 12, WIDTH)
    bank.append(rows_of(12, WIDTH))
    other = bank.as_worker(0, 1)
    optimiser = RowSGD([bank.keys], lr=1.0)
    hit = bank.read(rows_of(1, WIDTH), 3)
    first, second, third = hit.ids[0].tolist()
    other.write(torch.tensor([first]), torch.full((1, WIDTH), 5.0))  # nobody told the reader
    hit.rows.sum().backward()
    other.write(torch.tensor([second]), torch.full((1, WIDTH), 7.0))
    optimiser.step()
    keys = rows_of_tables(bank)[0]
    assert keys[first].eq(5).all()
    assert keys[second].eq(7).all()
    assert torch.equal(keys[third], rows_of(12, WIDTH)[third] - 1)


def test_no_question_is_asked_twice_where_nothing_changed():
    bank = sharded(3, 12, WIDTH)
    bank.append(rows_of(12, WIDTH))
    asked, ask = [], bank.shards.ask
    bank.shards.ask = lambda name, each: asked.append(name) or ask(name, each)
    optimiser = RowSGD([bank.keys], lr=1.0)

    def step(between=lambda: None):
        asked.clear()
        optimiser.zero_grad()
        hit = bank.read(rows_of(2, WIDTH), 3)
        between()
        hit.rows.sum().backward()
        optimiser.step()
        return asked

    assert step() == ["find", "fetch", "step"]
    assert step(lambda: bank.write(torch.tensor([3]), rows_of(1, WIDTH))) == [
        "find",
        "fetch",
        "write_at",
        "trainable_of",
        "step",
    ]
    bank.freeze(torch.tensor([4]))
    assert step() == ["find", "fetch", "trainable_of", "step"]
    bank.unfreeze()
    assert step() == ["find", "fetch", "step"]


def test_a_selection_and_its_counts_survive_a_save():
    bank = sharded(3, 12, WIDTH, metric="ip")
    bank.append(torch.eye(WIDTH))
    bank.read(torch.eye(WIDTH)[[0, 0, 1]], 1)
    assert bank.select(top=1).tolist() == [0]
    bank.read(torch.eye(WIDTH)[[3, 3, 4]], 1)
    bank.save()
    bank.restore()
    assert bank.is_trainable(torch.arange(3)).tolist() == [True, False, False]
    assert bank.select(top=1).tolist() == [3]
    assert whole(bank)[0].live.sum() == WIDTH


def trained(num_workers, steps, dtype):
    """Losses and rows of a training by workers, each with its part of a batch, in turns.

    One of them has a bank, several have shards.
    """
    make = MemoryBank if num_workers == 1 else partial(sharded, 4)
    bank = make(40, WIDTH, 3, dtype=dtype)
    bank.append(rows_of(37, WIDTH, dtype=dtype), rows_of(37, 3, seed=2, dtype=dtype))
    clients = [bank]
    if num_workers > 1:
        clients = [bank.as_worker(worker, of=num_workers) for worker in range(num_workers)]
    layers, optimisers = [], []
    for client in clients:
        torch.manual_seed(0)
        layers.append(nn.Linear(WIDTH, WIDTH, dtype=dtype))
        tables = [client.keys, client.values]
        optimisers.append(RowAdam([*layers[-1].parameters(), *tables], lr=0.02))
    losses = []
    for step in range(steps):
        batch = rows_of(8, WIDTH + 3, seed=100 + step, dtype=dtype).chunk(num_workers)
        loss_sum = 0.0
        for client, layer, optimiser, part in zip(clients, layers, optimisers, batch, strict=True):
            optimiser.zero_grad()
            query, target = part.split([WIDTH, 3], 1)
            hit = client.read(layer(query), 5)
            read = (hit.scores.mul(4).softmax(-1).unsqueeze(-1) * hit.values).sum(-2)
            loss = F.mse_loss(read, target)
            loss.backward()
            loss_sum += loss.item() / num_workers
        for parameters in zip(*(layer.parameters() for layer in layers), strict=True):
            mean = sum(parameter.grad for parameter in parameters) / num_workers
            for parameter in parameters:
                parameter.grad.copy_(mean)
        for optimiser in optimisers:
            optimiser.step()
        losses.append(loss_sum)
    return torch.tensor(losses, dtype=torch.float64), rows_of_tables(bank)


@pytest.mark.usefixtures("plain_errors")  # in a quarter of the time
@pytest.mark.parametrize("steps", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_two_workers_train_as_one_process_with_both_batches(steps):
    """To 1e-6, not bit for bit: a row's gradients, and the network's, are added up in two parts."""
    (one, one_rows), (two, two_rows) = (trained(number, steps, torch.float64) for number in (1, 2))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
    for ours, theirs in zip(two_rows, one_rows, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    sixth = steps // 6
    assert one[-sixth:].mean() < one[:sixth].mean()


def test_a_worker_that_never_steps_is_waited_for_so_long():
    bank = sharded(2, 10, WIDTH)
    bank.append(rows_of(10, WIDTH))
    worker = bank.as_worker(1, of=2)
    worker.shards.timeout = 0.05
    worker.read(rows_of(1, WIDTH), 10).rows.sum().backward()
    RowSGD([worker.keys], lr=1.0).step()
    with pytest.raises(
        ShardError, match=r"worker 1 has stepped, and the others of 2 have not with"
    ):
        worker.read(rows_of(1, WIDTH), 10)


def test_who_has_stepped_reads_on_once_all_have():
    bank = sharded(2, 10, WIDTH)
    bank.append(rows_of(10, WIDTH))
    workers = [bank.as_worker(worker, of=2) for worker in range(2)]
    for client in workers:
        client.read(rows_of(1, WIDTH), 10).rows.sum().backward()
    steps = [RowSGD([client.keys], lr=1.0).step for client in workers]
    steps[1]()
    hits = []
    thread = Thread(target=lambda: hits.append(workers[1].read(rows_of(1, WIDTH), 10)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    steps[0]()
    thread.join(20)
    expected = rows_of(10, WIDTH) - 1  # the mean of both gradients, which are 1
    assert torch.equal(hits[0].rows[0], expected[hits[0].ids[0]])


@pytest.mark.parametrize(
    ("num_shards", "value_width", "narrow", "index"),
    [
        (1, None, 0, "exact"),
        (4, 32, 0, "exact"),
        (4, 8, 1, "exact"),
        (4, 8, 0, "IVF4,Flat"),
        (4, 8, 0, "product-key"),
    ],
)
def test_bytes_on_the_wire_are_what_the_formula_says(num_shards, value_width, narrow, index):
    wire_dtype = torch.float16 if narrow else None
    of_pairs = index == "product-key"
    kind = {"index": index, "metric": "ip" if of_pairs else "cosine", "wire_dtype": wire_dtype}
    bank = sharded(num_shards, 400, 16, value_width, **kind)
    if of_pairs:
        bank.read(rows_of(1, 16), 1)  # the first one asks whether all rows are there
    else:
        bank.append(rows_of(400, 16), None if value_width is None else rows_of(400, value_width))
    optimiser = RowAdam(bank.tables, lr=0.1)
    bank.shards.traffic = traffic = Traffic()
    hit = bank.read(rows_of(64, 16), 8)
    (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum().backward()
    optimiser.step()
    number = {"row_bytes": 2, "gradient_bytes": 2} if narrow else {}
    number |= {"exact": index == "exact", "by_sub_keys": of_pairs}
    distinct = len(torch.unique(hit.ids))
    widths = (value_width, None) if of_pairs else (16, value_width)
    predicted = wire_bytes(num_shards, 64, 8, *widths, distinct=distinct, **number)
    assert traffic.sent == pytest.approx(predicted.sent, rel=0.1)
    assert traffic.received == pytest.approx(predicted.received, rel=0.1)
