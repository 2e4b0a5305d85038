"""Each change is done once, and a crash loses none that was answered."""

from unittest.mock import Mock

import pytest
import torch

from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.distributed.calls import Call, CallLog
from sparsemem.distributed.errors import OutOfTurnError
from sparsemem.distributed.server import KEPT_ANSWERS, ShardServer
from sparsemem.distributed.shard import ShardBank
from sparsemem.optim.remote import RowStep

SHARD = "ab" * 16


def bank():
    return ShardBank(8, 2, 1, metric="ip", dtype=torch.float64)


def put(ids, value, sequence, client="one", time=None):
    rows = torch.full((len(ids), 2), float(value), dtype=torch.float64)
    given = {"rows": rows, "values": rows[:, :1], "tags": None, "ttl": None}
    arguments = (torch.tensor(ids), given, time or sequence)
    return Call("write_at", arguments, client, sequence)


def row_step(ids, value, kind="RowAdam"):
    gradient = torch.full((len(ids), 2), float(value), dtype=torch.float64)
    return RowStep("keys", kind, {"lr": 0.1}, torch.tensor(ids), gradient)


def step(ids, value, sequence, worker=0, num_workers=1, kind="RowAdam"):
    arguments = ([row_step(ids, value, kind)], worker, num_workers)
    return Call("step", arguments, f"worker {worker}", sequence)


def same(one, other):
    for name, table in one.bank.state_dict().items():
        assert torch.equal(table, other.bank.state_dict()[name]), name


def test_a_repeated_change_is_answered_and_not_done_again():
    server = ShardServer(bank())
    server.call(put([1, 2], 1, 1))
    removed = Call("remove_at", (torch.tensor([2, 3]), None, 1), "one", 2)
    assert server.call(removed).tolist() == [2]
    assert server.call(removed).tolist() == [2]  # now nothing would be there to remove
    server.call(step([1], 1.0, 1))
    once = server.bank.keys[1].tolist()
    server.call(step([1], 1.0, 1))
    assert server.bank.keys[1].tolist() == once
    server.call(step([1], 1.0, 2))
    assert server.bank.keys[1].tolist() != once


def test_a_refused_change_is_refused_again_and_changes_nothing():
    server = ShardServer(bank())
    refused = Call("freeze_at", (torch.tensor([5]), True), "one", 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="ids holds 5, which is not live"):
            server.call(refused)
    server.call(put([5], 1, 2))
    assert server.bank.book.live.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("sequence", [1, 2, KEPT_ANSWERS + 4])
def test_a_change_out_of_its_order_is_refused(sequence):
    server = ShardServer(bank())
    for number in range(1, KEPT_ANSWERS + 3):
        server.call(put([number % 6], number, number))
    with pytest.raises(OutOfTurnError, match=f"change {sequence} of client 'one' comes after"):
        server.call(put([7], 1, sequence))
    assert not server.bank.book.live[7]


def test_the_last_changes_are_answered_again_and_not_done_again(tmp_path):
    """A client may have several under way, and lose all answers at once."""
    server = ShardServer(bank())
    server.call(put([0, 1, 2, 3], 1, 1))
    asked = [Call("remove_at", (torch.tensor([n, n + 1]), None, 1), "one", n + 2) for n in range(3)]
    asked.append(Call("freeze_at", (torch.tensor([7]), True), "one", 5))  # refused
    answers = [server.call(call).tolist() for call in asked[:3]]
    assert answers == [[0, 1], [2], [3]]
    with pytest.raises(ValueError, match="not live"):
        server.call(asked[3])
    server.checkpoint(tmp_path)
    for again in (server, ShardServer.restored(tmp_path, None, [])):
        assert [again.call(call).tolist() for call in asked[:3]] == answers
        with pytest.raises(ValueError, match="not live"):
            again.call(asked[3])
        with pytest.raises(OutOfTurnError):
            again.call(put([7], 1, 7))


def test_clients_are_numbered_apart_and_unknown_operations_refused():
    server = ShardServer(bank())
    server.call(put([1], 1, 1, "one"))
    server.call(put([2], 2, 1, "two"))
    assert server.bank.book.live.nonzero().flatten().tolist() == [1, 2]
    with pytest.raises(ValueError, match="operation is 'close', known: "):
        server.call(Call("close", ()))


def test_a_step_waits_for_all_workers_and_adds_in_their_order():
    server, alone = ShardServer(bank()), ShardServer(bank())
    for each in (server, alone):
        each.call(put([0, 1, 2], 1, 1))
    before = server.bank.keys.clone()
    server.call(step([0, 1], 1e16, 1, worker=1, num_workers=2, kind="RowSGD"))
    assert torch.equal(server.bank.keys, before)
    server.call(step([1, 2], 1.0, 1, worker=0, num_workers=2, kind="RowSGD"))
    parts = [row_step([1, 2], 1.0, "RowSGD"), row_step([0, 1], 1e16, "RowSGD")]
    alone.call(Call("step", (parts,), "worker 0", 1))
    assert torch.equal(server.bank.keys, alone.bank.keys)
    assert not torch.equal(server.bank.keys, before)


def test_a_crash_loses_nothing_that_was_answered(tmp_path):
    server = ShardServer(bank(), CallLog.create(tmp_path / "calls", SHARD))
    server.call(put([0, 1, 2, 3], 1, 1))
    server.call(step([0, 1], 0.5, 1))
    server.checkpoint(tmp_path / "checkpoint")
    server.change_log(lambda number: CallLog.create(tmp_path / "later", SHARD, number))
    server.call(step([1, 2], 0.25, 2))
    server.call(Call("mark", (torch.tensor([3, 3]), 4)))
    server.call(put([5], 7, 2, time=5))
    server.call(step([0, 5], -1.0, 3))
    with open(tmp_path / "later", "ab") as file:
        file.write(b"SMBL torn")  # of a call that was not answered
    log, calls = CallLog.reopen(tmp_path / "later", SHARD)
    again = ShardServer.restored(tmp_path / "checkpoint", log, calls)
    same(server, again)
    again.call(step([0, 5], -1.0, 3))  # repeated: its answer was lost with the process
    same(server, again)
    for each in (server, again):
        each._log = None
        each.call(step([0, 1, 2, 5], 0.125, 4))  # Adam's moments came back too
    same(server, again)


def test_damage_is_refused_with_its_place(tmp_path):
    log = CallLog.create(tmp_path / "calls", SHARD)
    log.append(put([0], 1, 1))
    data = bytearray((tmp_path / "calls").read_bytes())
    data[-3] ^= 1
    (tmp_path / "calls").write_bytes(data)
    with pytest.raises(DamagedError, match="calls is damaged: the record at byte"):
        CallLog.reopen(tmp_path / "calls", SHARD)


def test_a_call_that_cannot_be_logged_is_not_done(tmp_path, monkeypatch):
    server = ShardServer(bank(), CallLog.create(tmp_path / "calls", SHARD))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.write", full)
        with pytest.raises(BankError, match="No space left on device"):
            server.call(put([0], 1, 1))
    assert not server.bank.book.live.any()
    server.call(put([0], 1, 1))  # the same again, once there is room
    assert server.bank.book.live[0]


@pytest.mark.parametrize(
    "bad",
    [
        Call("step", ([row_step([1], 1.0)._replace(gradient=torch.ones(1, 5))],), "one", 2),
        Call("step", ([row_step([99], 1.0)],), "one", 2),
        Call("write_at", (torch.tensor([1]), {"colour": 3}, 2), "one", 2),
    ],
)
def test_a_call_that_is_not_as_it_should_be_is_refused_and_leaves_the_log_readable(tmp_path, bad):
    server = ShardServer(bank(), CallLog.create(tmp_path / "calls", SHARD))
    server.call(put([1, 2], 1, 1))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{bad.operation} failed with"):
            server.call(bad)
    server.call(put([3], 3, 3))
    log, calls = CallLog.reopen(tmp_path / "calls", SHARD)
    again = ShardServer.replayed(bank(), log, calls)
    same(server, again)
    assert again.bank.book.live.nonzero().flatten().tolist() == [1, 2, 3]


def test_a_change_that_ran_out_of_memory_and_was_asked_again_is_replayed_once(tmp_path):
    server = ShardServer(bank(), CallLog.create(tmp_path / "calls", SHARD))
    server.call(put([1], 1, 1))
    change = step([1], 1.0, 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ShardServer, "_step_table", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            server.call(change)
    server.call(change)
    log, calls = CallLog.reopen(tmp_path / "calls", SHARD)
    assert len(calls) == 3
    same(server, ShardServer.replayed(bank(), log, calls))
