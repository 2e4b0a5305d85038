"""Full disks, failing disks, folders that are not to be written to: an error, and all as it was."""

import os
import shutil

import pytest
import torch

from sparsemem import files
from sparsemem.bank import MemoryBank, folder, journal
from sparsemem.bank.errors import BankError
from tests.oracles.bank_state import fill, names, new_bank, reopened, rows_of
from tests.oracles.failing_disk import (
    EACCES,
    EIO,
    ENOSPC,
    EROFS,
    fail_at,
    fail_file,
    fail_half_way,
    forbid,
    without_permission,
)

FAULTS = {
    "append": fail_half_way,
    "write": lambda patch, number, code: fail_file(patch, "write", number, code),
    "flush": lambda patch, number, code: fail_file(patch, "flush", number, code),
    "fsync": lambda patch, number, code: fail_at(patch, os, "fsync", number, code),
    "replace": lambda patch, number, code: fail_at(patch, os, "replace", number, code),
    "manifest": lambda patch, number, code: fail_at(patch, folder, "replace_file", number, code),
}


@pytest.mark.parametrize(
    ("fault", "code", "times"),
    [
        ("append", ENOSPC, 1),  # of the new log's first record
        ("write", ENOSPC, 5),  # of two shards of rows, two of usage, and the manifest
        ("flush", ENOSPC, 5),
        ("fsync", ENOSPC, 10),  # of those, the old log, the new log, and the folder three times
        ("fsync", EIO, 10),
        ("replace", EROFS, 1),
        ("replace", ENOSPC, 1),
        ("manifest", EACCES, 1),
    ],
)
def test_a_save_that_fails_anywhere_leaves_the_old_state_whole(
    tmp_path, monkeypatch, small_shards, fault, code, times
):
    number, failed, at = 0, True, set()
    while failed:
        path = tmp_path / f"bank{number}"
        bank = fill(new_bank(path))
        bank.save()
        bank.append(torch.randn(4, 3))  # in two shards
        failed = False
        with monkeypatch.context() as patch:
            named = FAULTS[fault](patch, number, code)
            try:
                bank.save()
            except BankError as error:
                assert os.strerror(code) in str(error)  # noqa: PT017
                failed = True
        at |= set(named or ())
        shutil.copytree(path, tmp_path / f"copy{number}")
        assert rows_of(MemoryBank.load(tmp_path / f"copy{number}")) == rows_of(bank)
        bank.write(torch.tensor([0]), torch.randn(1, 3))  # still durable; another shard
        shutil.copytree(path, tmp_path / f"after{number}")
        assert rows_of(MemoryBank.load(tmp_path / f"after{number}")) == rows_of(bank)
        bank.save()
        assert rows_of(reopened(bank, path)) == rows_of(bank)
        number += 1
    assert number == times + 1
    if fault in ("write", "flush"):
        assert {name.split("-")[0] for name in at} == {"rows", "usage", ".manifest.json.part"}


def test_a_failed_save_gives_back_its_room(tmp_path, monkeypatch, small_shards):
    bank = fill(new_bank(tmp_path / "bank"))
    bank.save()
    before = names(tmp_path / "bank")
    bank.append(torch.randn(6, 3))
    with monkeypatch.context() as patch:
        patch.setattr(folder, "replace_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(BankError, match=r"cannot write to .*bank: full; what it held before"):
            bank.save()
    assert names(tmp_path / "bank") == sorted([*before, "log-00000002"])


def test_a_save_that_is_interrupted_before_it_writes_forgets_no_shard(
    tmp_path, monkeypatch, small_shards
):
    bank = fill(new_bank(tmp_path / "bank"))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.BankFolder, "_used", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bank.save()
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


WRITES = {
    "append": lambda bank: bank.append(torch.randn(1, 3)),
    "write": lambda bank: bank.write(torch.tensor([0]), torch.randn(1, 3)),
    "remove": lambda bank: bank.remove(torch.tensor([0])),
    "freeze": lambda bank: bank.freeze(torch.tensor([0])),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("fault", ["none of it", "half of it", "fsync"])
def test_a_full_disk_refuses_a_write_and_changes_nothing(tmp_path, monkeypatch, write, fault):
    bank = fill(new_bank(tmp_path / "bank", sync=True))
    expected, log = rows_of(bank), tmp_path / "bank" / "log-00000000"
    whole = log.read_bytes()
    with monkeypatch.context() as patch:
        if fault == "half of it":
            fail_half_way(patch, 0, ENOSPC)
        else:
            fail_at(patch, journal.os, "fsync" if fault == "fsync" else "write", 0, ENOSPC)
        with pytest.raises(BankError, match="log-00000000: No space left on device; the bank"):
            write(bank)
    assert rows_of(bank) == expected
    assert log.read_bytes() == whole
    assert bank.read(torch.tensor(expected[0][0])[None], 1).ids.tolist() == [[0]]
    write(bank)
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank) != expected


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    bank = new_bank(tmp_path / "bank", num_rows=200_000)
    bank.append(torch.randn(2, 3))
    expected = rows_of(bank)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(BankError, match=r"cannot write to .*log-00000000: File too large"):
            bank.append(torch.randn(100_000, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert rows_of(bank) == expected
    bank.append(torch.randn(2, 3))
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


@pytest.fixture
def saved(tmp_path):
    """A durable bank that was saved before, so that nothing is left to import."""
    bank = fill(new_bank(tmp_path / "bank"))
    bank.save()
    bank.append(torch.randn(1, 3))
    return bank


def test_a_read_only_folder_is_an_error(tmp_path, saved):
    path, before = tmp_path / "bank", rows_of(saved)
    with without_permission(path), pytest.raises(BankError, match="Permission denied"):
        saved.save()
    assert rows_of(saved) == before
    saved.append(torch.randn(1, 3))
    assert rows_of(reopened(saved, path)) == rows_of(saved)


@pytest.mark.parametrize("code", [EACCES, EROFS])
def test_a_folder_that_becomes_read_only_is_an_error(tmp_path, monkeypatch, saved, code):
    path, before, held = tmp_path / "bank", rows_of(saved), names(tmp_path / "bank")
    with monkeypatch.context() as patch:
        forbid(patch, path, code)
        with pytest.raises(BankError, match=f"cannot write to .*bank: {os.strerror(code)}; what"):
            saved.save()
    assert (rows_of(saved), names(path)) == (before, held)
    saved.append(torch.randn(1, 3))
    assert rows_of(reopened(saved, path)) == rows_of(saved)


@pytest.mark.parametrize("code", [EACCES, EROFS])
def test_no_bank_begins_in_a_read_only_folder(tmp_path, monkeypatch, code):
    bank = fill(new_bank())
    with monkeypatch.context() as patch:
        forbid(patch, tmp_path, code)
        for make in (lambda: new_bank(tmp_path / "new"), lambda: bank.save(tmp_path / "new")):
            with pytest.raises(BankError, match=f"cannot write to .*new: {os.strerror(code)}"):
                make()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path, monkeypatch):
    fill(new_bank(tmp_path / "bank")).close()
    fail_at(monkeypatch, os, "open", 0, EROFS)
    with pytest.raises(BankError, match=r"cannot open .*lock: Read-only file system"):
        MemoryBank.load(tmp_path / "bank")


def test_a_snapshot_that_fails_leaves_nothing(tmp_path, monkeypatch):
    bank = fill(new_bank())
    with monkeypatch.context() as patch:
        fail_at(patch, files.os, "replace", 0, ENOSPC)
        with pytest.raises(BankError, match=r"cannot write to .*saved: No space left"):
            bank.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    bank.save(tmp_path / "saved")
