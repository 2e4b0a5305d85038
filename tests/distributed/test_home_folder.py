"""What a shard's folder holds is checked: locks, logs, manifests, checkpoints."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.distributed import home as home_module
from sparsemem.distributed.calls import Call
from sparsemem.distributed.home import ShardHome, checkpoint_at, folder_of, read_manifest
from sparsemem.distributed.home import write_manifest as put_in_force
from sparsemem.distributed.transport import LocalShards
from tests.oracles.shard_homes import WIDTH, change, filled, new_bank, opened, step
from tests.oracles.shard_states import same_state, state_of


def test_two_homes_on_one_folder_are_refused(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    with pytest.raises(BankError, match="shard-00000 is in use"):
        LocalShards(tmp_path / "bank")
    bank.close()
    opened(tmp_path / "bank").close()


HOLD = """
import sys, time
from pathlib import Path
from sparsemem.distributed.transport import LocalShards
shards = LocalShards(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_does_not_last(tmp_path, repository):
    bank = filled(new_bank(tmp_path / "bank"))
    expected = state_of(bank)
    bank.close()
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "bank")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(BankError, match="is in use"):
            LocalShards(tmp_path / "bank")
        holder.kill()
        home = ShardHome(tmp_path / "bank", 0, patience=10.0)  # it may take a moment to go
    home.close()
    same_state(state_of(opened(tmp_path / "bank")), expected)


def test_a_torn_tail_is_of_no_call_that_was_answered(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    expected = state_of(bank)
    bank.close()
    log = folder_of(tmp_path / "bank", 1) / "calls-0"
    whole = log.read_bytes()
    for tail in (b"SMBL torn", bytes(100), whole[:40]):
        log.write_bytes(whole + tail)
        again = opened(tmp_path / "bank")
        same_state(state_of(again), expected)
        again.close()
        assert log.read_bytes() == whole


def two_logs(tmp_path):
    """A bank whose shards have a log from before a save that failed, and one from after it."""
    bank = filled(new_bank(tmp_path / "bank"))
    bank._ask("checkpoint", (1,))
    change(bank)
    bank.close()
    return folder_of(tmp_path / "bank", 0)


def test_a_log_that_is_missing_is_noticed(tmp_path):
    folder = two_logs(tmp_path)
    (folder / "calls-0").rename(tmp_path / "calls-0")
    with pytest.raises(DamagedError, match=r"cannot read .*calls-0: it is missing"):
        ShardHome(tmp_path / "bank", 0)


def test_a_log_that_lost_its_end_is_noticed(tmp_path):
    folder = two_logs(tmp_path)
    size = (folder / "calls-0").stat().st_size
    os.truncate(folder / "calls-0", size - 5)
    with pytest.raises(DamagedError, match="calls-0 is torn, and calls-1 goes on after it"):
        ShardHome(tmp_path / "bank", 0)


def test_a_log_that_lost_whole_records_is_noticed(tmp_path):
    folder = two_logs(tmp_path)
    bank = home_module.CallLog.read(folder / "calls-1", read_manifest(tmp_path / "bank").log_id(0))
    assert bank.first > 1
    begun = (folder / "calls-0").read_bytes()
    length = 32 + int.from_bytes(begun[16:24], "little")
    (folder / "calls-0").write_bytes(begun[:length])
    with pytest.raises(DamagedError, match=r"calls-1 begins with \d+, expected 1"):
        ShardHome(tmp_path / "bank", 0)


def test_logs_of_others_are_refused(tmp_path):
    filled(new_bank(tmp_path / "bank")).close()
    filled(new_bank(tmp_path / "other")).close()
    for source in (folder_of(tmp_path / "bank", 1), folder_of(tmp_path / "other", 0)):
        shutil.copy(source / "calls-0", folder_of(tmp_path / "bank", 0) / "calls-0")
        with pytest.raises(BankError, match="calls-0 is another shard's log"):
            ShardHome(tmp_path / "bank", 0)


def test_a_manifest_that_is_old_is_noticed(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    old = [read_manifest(tmp_path / "bank")]
    bank.save()
    old.append(read_manifest(tmp_path / "bank"))
    step(bank, 1)
    bank.save()
    bank.close()
    for manifest in old:
        put_in_force(tmp_path / "bank", manifest)
        with pytest.raises(DamagedError, match=f"calls-{manifest.version}: it is missing"):
            ShardHome(tmp_path / "bank", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a sharded bank's: it: Invalid JSON"),
        ('{"format": "sparsemem bank"}', "is not a sharded bank's: format: "),
        (None, "cannot read .*manifest.json: No such file"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, text, message):
    new_bank(tmp_path / "bank").close()
    file = tmp_path / "bank" / "manifest.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(BankError, match=message):
        ShardHome(tmp_path / "bank", 0)


def test_a_checkpoint_that_is_damaged_is_refused(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.save()
    bank.close()
    place = checkpoint_at(folder_of(tmp_path / "bank", 0), 1)
    state = place / "state.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[: len(data) // 2])
    with pytest.raises(BankError, match=r"state.safetensors is not a shard's state"):
        ShardHome(tmp_path / "bank", 0)
    shutil.rmtree(place)
    with pytest.raises(BankError, match="checkpoint-1"):
        ShardHome(tmp_path / "bank", 0)


def test_what_was_read_before_a_shard_was_closed_is_written_down(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.read(torch.randn(3, WIDTH), 2)
    expected = state_of(bank)
    for home in bank.shards.homes:
        home.call(Call("close", ()))  # as from an actor that is to end
        with pytest.raises(BankError, match="is closed"):
            home.call(Call("standing", ()))
    same_state(state_of(opened(tmp_path / "bank")), expected)
