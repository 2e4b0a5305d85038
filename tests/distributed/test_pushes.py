"""One shard's part of a step of several workers."""

import pytest
import torch

from sparsemem.distributed.calls import Call, CallLog
from sparsemem.distributed.server import ShardServer
from sparsemem.distributed.shard import ShardBank
from sparsemem.optim.remote import Push, RowStep

SHARD = "cd" * 16


def bank():
    result = ShardBank(8, 2, metric="ip", dtype=torch.float64)
    result.write(torch.arange(8), torch.zeros(8, 2, dtype=torch.float64))
    return result


def push(worker, sequence, ids, *values, table="keys"):
    gradient = torch.tensor(values, dtype=torch.float64).unsqueeze(1).expand(-1, 2).contiguous()
    pushes = [Push(table, torch.tensor(ids), gradient)]
    return Call("push", (pushes, worker, 2), f"worker {worker}", sequence)


def step(worker, sequence, factor):
    ids, gradient = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.float64)
    own = RowStep("keys", "RowSGD", {"lr": 1.0}, ids, gradient, factor=factor)
    return Call("step", ([own], worker, 2), f"worker {worker}", sequence)


def norms(server, worker):
    return server.call(Call("squared_norms", (worker,)))


def test_a_push_that_is_repeated_counts_once():
    server = ShardServer(bank())
    for _ in range(2):
        assert server.call(push(0, 1, [0, 1], 1.0, 2.0)) is None
    assert norms(server, 0) is None
    assert norms(server, 1) == {}  # it has not pushed
    for _ in range(2):
        assert server.call(push(1, 1, [1, 2], 3.0, 4.0)) == {"keys": 2 * (1 + 25 + 16)}
    assert norms(server, 0) == {"keys": 84}
    assert not server.bank.keys.any()
    for worker in (1, 0, 1, 0):
        server.call(step(worker, 2, 0.5))
    assert server.bank.keys[:4, 0].tolist() == [-0.5, -2.5, -2, 0]


def test_a_push_takes_the_place_of_one_that_was_not_stepped():
    server = ShardServer(bank())
    server.call(push(0, 1, [0], 1.0))
    server.call(push(0, 2, [0, 3], 2.0, 1.0))
    server.call(push(1, 1, [], *[]))
    assert norms(server, 0) == norms(server, 1) == {"keys": 10}
    server.call(push(0, 3, [5], 3.0))
    assert norms(server, 0) is None  # of this one
    assert norms(server, 1) == {"keys": 10}
    server.call(push(1, 2, [5], 1.0))
    for worker in (0, 1):
        server.call(step(worker, 3 + (worker == 0), 1.0))
    assert server.bank.keys.nonzero()[:, 0].unique().tolist() == [5]
    assert server.bank.keys[5].tolist() == [-4, -4]


def test_a_step_of_what_was_not_pushed_is_refused():
    server = ShardServer(bank())
    with pytest.raises(ValueError, match="a step of keys by worker 0, expected a push before"):
        server.call(step(0, 1, 1.0))
    server.call(push(0, 2, [0], 1.0))
    server.call(push(1, 1, [0], 1.0))
    server.call(step(0, 3, 1.0))
    with pytest.raises(ValueError, match="expected a push before"):
        server.call(step(0, 4, 1.0))  # it has been stepped


@pytest.mark.parametrize("cut", range(1, 5))
def test_what_was_pushed_outlives_the_process(tmp_path, cut):
    """From a checkpoint at any point, and from the log."""
    calls = [
        push(1, 1, [0, 1], 0.1, 0.2),
        push(0, 1, [1, 2], 0.3, 0.7),
        step(1, 2, 0.3),
        push(1, 3, [4], 1.5),
        step(0, 2, 0.3),
    ]
    expected = ShardServer(bank())
    answers = [expected.call(call) for call in calls]
    server = ShardServer(bank(), CallLog.create(tmp_path / "first", SHARD))
    for call in calls[:cut]:
        server.call(call)
    (tmp_path / "checkpoint").mkdir()
    server.checkpoint(tmp_path / "checkpoint")
    server.change_log(lambda number: CallLog.create(tmp_path / "second", SHARD, number))
    log, none = CallLog.reopen(tmp_path / "second", SHARD)
    again = ShardServer.restored(tmp_path / "checkpoint", log, none)
    assert [again.call(call) for call in calls[cut:]] == answers[cut:]
    log, logged = CallLog.reopen(tmp_path / "second", SHARD)
    replayed = ShardServer.restored(tmp_path / "checkpoint", log, logged)
    for server in (again, replayed):
        assert torch.equal(server.bank.keys, expected.bank.keys)
        for worker in (0, 1):
            assert norms(server, worker) == norms(expected, worker)
            assert server.call(Call("waiting", (worker,))) == 0
    gone = ShardServer.restored(tmp_path / "checkpoint", None, [], gone_back=True)
    assert norms(gone, 1) == {}
