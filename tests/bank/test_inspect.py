"""Looking at a bank beside a process that writes to it: no damage is seen that is not there."""

import os
import threading
import warnings

import pytest
import torch

from sparsemem.bank import recovery
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.recovery import inspect_folder
from tests.oracles.bank_state import fill, new_bank


def meanwhile(monkeypatch, task, times=1):
    """Do something each time that a log is about to be read, so often."""
    left, real = [times], recovery.LogReader.__iter__

    def reading(self):
        if left[0]:
            left[0] -= 1
            task()
        return real(self)

    monkeypatch.setattr(recovery.LogReader, "__iter__", reading)


@pytest.mark.parametrize("times", [1, 4])
def test_a_save_meanwhile_is_no_damage(tmp_path, monkeypatch, times):
    bank = fill(new_bank(tmp_path / "bank"))

    def save():
        bank.append(torch.randn(1, 3))
        bank.save()  # the log that is about to be read goes

    meanwhile(monkeypatch, save, times)
    summary = inspect_folder(tmp_path / "bank")
    assert (summary.manifest.save, summary.operations) == (times, 0)
    assert summary.log_bytes == (tmp_path / "bank" / f"log-0000000{times}").stat().st_size


def test_a_log_begun_after_the_last_was_read_is_no_damage(tmp_path, monkeypatch):
    bank = fill(new_bank(tmp_path / "bank"))
    real, late = recovery.log_path, []

    def log_path(folder, number):
        if number == 1 and not late:  # the first one has been read, up to here
            late.append(number)
            bank.append(torch.randn(1, 3))
            with bank.table.lock.read():
                bank.journal._begin_log(bank)
        return real(folder, number)

    monkeypatch.setattr(recovery, "log_path", log_path)
    assert inspect_folder(tmp_path / "bank").operations == 7
    assert late == [1]


def test_a_record_that_is_being_written_is_no_torn_tail(tmp_path, monkeypatch):
    bank = fill(new_bank(tmp_path / "bank"))
    log = tmp_path / "bank" / "log-00000000"
    whole = log.read_bytes()
    os.truncate(log, len(whole) - 5)
    real = recovery.read_logs

    def reading(*arguments):
        tail = real(*arguments)
        log.write_bytes(whole)  # now the writer is done
        return tail

    monkeypatch.setattr(recovery, "read_logs", reading)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_folder(tmp_path / "bank").operations == 6
    bank.close()


def test_a_folder_that_never_rests_is_said_to(tmp_path, monkeypatch):
    bank = fill(new_bank(tmp_path / "bank"))
    pauses = []
    monkeypatch.setattr(recovery.time, "sleep", pauses.append)
    meanwhile(monkeypatch, bank.save, times=100)
    with pytest.raises(BankError, match=r"bank changed while it was read, 10 times: another") as e:
        inspect_folder(tmp_path / "bank")
    assert not isinstance(e.value, DamagedError)
    assert pauses == [pytest.approx(0.02 * n) for n in range(10)]


def test_damage_at_rest_is_named_at_once(tmp_path, monkeypatch):
    fill(new_bank(tmp_path / "bank")).close()
    log = tmp_path / "bank" / "log-00000000"
    content = bytearray(log.read_bytes())
    content[-1] ^= 1
    log.write_bytes(content)
    monkeypatch.setattr(recovery, "ATTEMPTS", 1)
    with pytest.raises(DamagedError, match="log-00000000 is damaged"):
        inspect_folder(tmp_path / "bank")
    log.unlink()
    with pytest.raises(DamagedError, match=r"cannot read .*log-00000000: No such file"):
        inspect_folder(tmp_path / "bank")


@pytest.mark.parametrize("task", ["appends", "saves"])
def test_beside_a_busy_writer(tmp_path, task):
    bank = new_bank(tmp_path / "bank", num_rows=50)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            bank.append(torch.randn(3, 3))
            if task == "saves":
                bank.save()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(15):
                assert inspect_folder(tmp_path / "bank").manifest.durable
    finally:
        stop.set()
        thread.join()
    bank.close()
