"""A shard's folder gives back all that was answered, whatever stopped its process and when."""

import errno
import os

import pytest
import torch

from sparsemem.bank.errors import BankError
from sparsemem.distributed import home as home_module
from sparsemem.distributed.calls import Call
from sparsemem.distributed.home import ShardHome, checkpoint_at, folder_of, read_manifest
from sparsemem.optim import RowAdam
from tests.oracles.crashes import Crashes
from tests.oracles.failing_disk import ENOSPC, fail_at, fail_file, fail_half_way
from tests.oracles.shard_homes import (
    ROWS,
    SHARDS,
    WIDTH,
    change,
    filled,
    new_bank,
    opened,
    step,
    then,
)
from tests.oracles.shard_states import same_state, state_of


def test_a_crash_at_any_moment_of_a_save_loses_nothing(tmp_path, monkeypatch):
    path, copies = tmp_path / "bank", tmp_path / "copies"
    copies.mkdir()
    bank = filled(new_bank(path))
    bank.save()
    change(bank)
    expected = state_of(bank)
    with monkeypatch.context() as patch:
        crashes = Crashes(patch, path, copies)
        bank.save()
    assert len(crashes.states) > 40
    losses, after = then(bank)
    for number, state in enumerate(crashes.states):
        again = opened(state)
        same_state(state_of(again), expected)
        if number % 4 == 0:
            assert then(again)[0] == losses, state
            same_state(state_of(again), after)
            again.save()  # whatever number the crash left unused
            saved = state_of(again)
            step(again, 3)
            again.restore()
            same_state(state_of(again), saved)
        again.close()


@pytest.mark.parametrize("version", [0, 1])
def test_a_shard_that_is_as_it_was_saved_reads_nothing_again(tmp_path, monkeypatch, version):
    """A run that goes on opens its shards and takes them to its checkpoint's version."""
    bank = new_bank(tmp_path / "bank")
    if version:
        filled(bank).save()
    expected, after = state_of(bank), then(bank)
    bank.restore(version)
    bank.close()
    bank, read = opened(tmp_path / "bank"), []
    monkeypatch.setattr(home_module, "read_server", lambda *given: read.append(given))
    bank.restore(version)
    assert not read
    same_state(state_of(bank), expected)
    monkeypatch.undo()
    same_state(then(bank)[1], after[1])
    bank.restore(version)  # now there is something to go back from
    same_state(state_of(bank), expected)
    assert then(bank)[0] == after[0]
    bank.close()
    same_state(state_of(opened(tmp_path / "bank")), after[1])


def test_a_crash_at_any_moment_of_a_restore_leaves_all_shards_before_or_after_it(
    tmp_path, monkeypatch
):
    path, copies = tmp_path / "bank", tmp_path / "copies"
    copies.mkdir()
    bank = filled(new_bank(path))
    bank.save()
    saved = state_of(bank)
    change(bank)
    later = state_of(bank)
    with monkeypatch.context() as patch:
        crashes = Crashes(patch, path, copies)
        bank.restore()
    same_state(state_of(bank), saved)
    assert len(crashes.states) > 6
    gone_back = 0
    for state in crashes.states:
        again = opened(state)
        if gone_back or read_manifest(state).log != read_manifest(state).version:
            gone_back += 1
            same_state(state_of(again), saved)
        else:
            same_state(state_of(again), later)
        again.close()
    assert 0 < gone_back < len(crashes.states)
    step(bank, 4)
    after = state_of(bank)
    bank.close()
    again = opened(path)
    same_state(state_of(again), after)


def test_a_bank_goes_back_as_often_as_asked(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.save()
    saved = state_of(bank)
    for _ in range(3):
        change(bank)
        bank.restore()
        same_state(state_of(bank), saved)
        change(bank)  # its changes are numbered anew
    bank.close()
    again = opened(tmp_path / "bank")
    again.restore()
    same_state(state_of(again), saved)


def test_a_bank_goes_back_to_being_empty(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.restore()
    assert bank.stats()["num_live"] == 0
    filled(bank)
    bank.close()
    again = opened(tmp_path / "bank")
    assert again.stats()["num_live"] == ROWS - 2


def test_a_checkpoint_whose_answer_was_lost_is_not_made_again(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    home = bank.shards.homes[1]
    home.call(Call("checkpoint", (5,)))
    file = checkpoint_at(home.folder, 5) / "state.safetensors"
    made = file.stat().st_ino
    home.call(Call("checkpoint", (5,)))
    assert file.stat().st_ino == made
    with pytest.raises(BankError, match="version is 4, expected more than 5, the last"):
        home.call(Call("checkpoint", (4,)))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_save_that_failed_on_one_shard_is_made_again_whole(tmp_path, monkeypatch, shard):
    bank = filled(new_bank(tmp_path / "bank"))
    real, failing = ShardHome.checkpoint, {shard}

    def checkpoint(home, version):
        if home.shard in failing:
            raise BankError("the disk is full")
        real(home, version)

    monkeypatch.setattr(ShardHome, "checkpoint", checkpoint)
    with pytest.raises(BankError, match="the disk is full"):
        bank.save()
    change(bank)
    saved = state_of(bank)
    failing.clear()
    bank.save()  # of this moment in all shards, though one has a checkpoint of the one before
    step(bank, 3)
    bank.restore()
    same_state(state_of(bank), saved)


@pytest.mark.parametrize("method", ["write", "flush"])
@pytest.mark.parametrize("number", range(3))
def test_a_disk_that_is_full_while_saving(tmp_path, monkeypatch, method, number):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.save()
    change(bank)
    expected = state_of(bank)
    with monkeypatch.context() as patch:
        failed = fail_file(patch, method, number, ENOSPC)
        with pytest.raises(BankError, match="No space left on device"):
            bank.save()
        assert failed
    same_state(state_of(bank), expected)
    bank.close()
    again = opened(tmp_path / "bank")
    same_state(state_of(again), expected)
    again.save()
    again.restore()
    same_state(state_of(again), expected)


def test_a_change_that_one_shard_had_no_room_for_is_made_good(tmp_path, monkeypatch):
    bank = filled(new_bank(tmp_path / "bank"))
    ids, rows = torch.arange(4), torch.arange(12.0).view(4, 3)
    for failing in (lambda p: fail_half_way(p, 1, ENOSPC), lambda p: fail_at(p, os, "write", 0, 5)):
        with monkeypatch.context() as patch:
            failing(patch)
            with pytest.raises(BankError, match=r"No space left|Input/output error"):
                bank.write(ids, rows)
        assert torch.equal(bank.gather(ids), rows)  # asking anything brings it to its end
        bank.write(ids, rows + 1)
    bank.remove(torch.tensor([1]))
    expected = state_of(bank)
    bank.close()
    again = opened(tmp_path / "bank")
    same_state(state_of(again), expected)


def test_a_step_that_is_asked_for_again_is_one_step(tmp_path, monkeypatch):
    states = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        bank = filled(new_bank(tmp_path / name))
        optimiser = RowAdam([bank.keys], lr=0.1)
        bank.read(torch.ones(1, WIDTH), 8).scores.sum().backward()
        if name == "two":
            for number in (0, 1):
                with monkeypatch.context() as patch:
                    fail_at(patch, os, "write", number, ENOSPC)
                    with pytest.raises(BankError, match="No space left"):
                        optimiser.step()
        optimiser.step()
        states.append(state_of(bank))
    same_state(*states)


def test_what_is_not_needed_goes(tmp_path, monkeypatch):
    bank = filled(new_bank(tmp_path / "bank"))
    monkeypatch.setattr(ShardHome, "forget", lambda home: None)
    bank.save()
    step(bank, 1)
    bank.save()
    bank.close()
    folder = folder_of(tmp_path / "bank", 0)
    assert {"calls-0", "calls-1", "calls-2", "checkpoint-1"} <= set(os.listdir(folder))
    monkeypatch.undo()
    opened(tmp_path / "bank").close()
    assert sorted(os.listdir(folder)) == ["calls-2", "checkpoint-2", "lock"]


def test_marks_are_counted_once_across_a_save(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.read(torch.randn(3, WIDTH), 2)
    for version in (1, 2):
        bank._ask("checkpoint", (version,))  # by a save that does not get to its end
    bank.write(torch.tensor([0]), torch.ones(1, WIDTH))
    bank.read(torch.randn(3, WIDTH), 2)
    bank.write(torch.tensor([1]), torch.ones(1, WIDTH))
    expected = state_of(bank)
    bank.close()
    same_state(state_of(opened(tmp_path / "bank")), expected)


def test_rows_written_before_a_driver_came_take_gradients(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    change(bank)
    clock = bank.clock
    bank.close()
    again = opened(tmp_path / "bank")
    assert again.clock >= clock - 1
    again.read(torch.randn(4, WIDTH), 3).scores.sum().backward()
    assert again.keys.grad.coalesce().indices().shape[1] > 3


def test_a_shard_that_could_not_go_back_does_so_at_the_next_call(tmp_path, monkeypatch):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.save()
    saved = state_of(bank)
    change(bank)
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(home_module.CallLog, "create", full)
        with pytest.raises(BankError, match="No space left on device"):
            bank.restore()
    bank.restore()
    same_state(state_of(bank), saved)


@pytest.mark.parametrize("sync", [False, True])
def test_with_sync_the_disk_is_waited_for_at_each_change(tmp_path, monkeypatch, sync):
    bank = filled(new_bank(tmp_path / "bank", sync=sync))
    synced, real = [], os.fsync
    for _ in range(2):  # also in the log that a save begins
        synced.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda file: synced.append(file) or real(file))
            bank.write(torch.arange(4), torch.ones(4, WIDTH))
        assert len(synced) == (SHARDS if sync else 0)
        bank.save()
