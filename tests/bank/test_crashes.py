"""Crashes, full disks, failing disks: nothing acknowledged is lost, nothing half is loaded."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.bank import MemoryBank, folder, journal
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.recovery import verify_folder
from tests.oracles.bank_state import NUM_ROWS, fill, names, new_bank, reopened, rows_of
from tests.oracles.failing_disk import fail_at

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "write", "tags", "remove", "freeze", "unfreeze"]),
        st.sets(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=4).map(sorted),
    ),
    min_size=1,
    max_size=8,
)


def apply(bank, name, ids):
    bank.expire()  # what the operation would do first
    ids = torch.tensor(ids)
    live = ids[bank.book.live[ids]]
    if name == "append":
        bank.unfreeze()
        bank.append(torch.randn(len(ids), 3), torch.randn(len(ids), 2), tags=int(ids[0]))
    elif name == "write":
        bank.write(ids, torch.randn(len(ids), 3), ttl=int(ids[0]) or None)
    elif name == "tags":
        bank.write(live, tags=3, ttl=30)
    elif name == "remove":
        bank.remove(ids)
    elif name == "freeze":
        bank.freeze(live)
    else:
        bank.unfreeze(ids)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=OPERATIONS, after=OPERATIONS, data=st.data())
def test_a_log_cut_off_anywhere_gives_a_prefix_of_the_operations(tmp_path, before, after, data):
    path, cut = tmp_path / "bank", tmp_path / "cut"
    shutil.rmtree(path, ignore_errors=True)
    bank = new_bank(path)
    for operation in before:
        apply(bank, *operation)
    bank.save()
    log = path / "log-00000001"
    states = []  # what the bank was when the log had a length
    record = bank.journal.record

    def noting(kind, ids, arrays):
        states.append((log.stat().st_size, rows_of(bank)))
        record(kind, ids, arrays)

    bank.journal.record = noting
    for operation in after:
        apply(bank, *operation)
    states.append((log.stat().st_size, rows_of(bank)))
    bank.close()
    for _ in range(6):
        length = data.draw(st.integers(states[0][0], states[-1][0]))
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(path, cut)
        os.truncate(cut / log.name, length)
        end, expected = [state for state in states if state[0] <= length][-1]
        if end == length:
            loaded = MemoryBank.load(cut)
        else:
            message = f"{log.name} has a torn tail: the {length - end} bytes from byte {end} on"
            with pytest.warns(UserWarning, match=message):
                loaded = MemoryBank.load(cut)
            assert (cut / log.name).stat().st_size == end
        assert rows_of(loaded) == expected
        loaded.append(torch.randn(1, 3))
        assert rows_of(reopened(loaded, cut)) == rows_of(loaded)


class Crashes:
    """Copies a folder as a crash would leave it, at every call that has an effect on the disk.

    With `power`, the machine fails: of a file, only what was waited for is there.
    """

    def __init__(self, monkeypatch, path, copies, power):
        self.path, self.copies, self.power = path, copies, power
        self.states = []
        self.synced = {}
        for module, name in ((os, "fsync"), (os, "replace"), (os, "ftruncate"), (Path, "unlink")):
            self.watch(monkeypatch, module, name)

    def watch(self, monkeypatch, module, name):
        real = getattr(module, name)

        def watched(*arguments, **options):
            self.crash(name)
            result = real(*arguments, **options)
            if name == "fsync":
                status = os.fstat(arguments[0])
                self.synced[status.st_ino] = status.st_size
            return result

        monkeypatch.setattr(module, name, watched)

    def crash(self, name):
        if not self.path.exists():
            return
        copy = self.copies / f"{len(self.states)}-{name}"
        shutil.copytree(self.path, copy)
        for file in self.path.iterdir() if self.power else ():
            length = self.synced.get(file.stat().st_ino, 0)
            os.truncate(copy / file.name, min(length, (copy / file.name).stat().st_size))
        self.states.append(copy)


@pytest.mark.filterwarnings("ignore:.*torn tail")
@pytest.mark.parametrize("power", [False, True])
def test_a_crash_at_any_moment_of_a_save_loses_nothing(tmp_path, monkeypatch, small_shards, power):
    path = tmp_path / "bank"
    with monkeypatch.context() as patch:
        crashes = Crashes(patch, path, tmp_path / "copies", power)
        bank = fill(new_bank(path, sync=power))
        bank.save()
        bank.append(torch.randn(2, 3))
        bank.remove(torch.tensor([3]))
        expected = rows_of(bank)
        start = len(crashes.states)
        bank.save()
        end = len(crashes.states)
        bank.append(torch.randn(1, 3))
    during = crashes.states[start:end]
    assert len(during) > 12
    for state in during:
        loaded = MemoryBank.load(state)
        assert rows_of(loaded) == expected, state
        loaded.append(torch.randn(1, 3))
        loaded.save()
        assert rows_of(reopened(loaded, state)) == rows_of(loaded)
    for state in crashes.states[end:]:
        assert rows_of(MemoryBank.load(state)) in (expected, rows_of(bank))


@pytest.mark.filterwarnings("ignore:.*torn tail")
def test_without_sync_the_end_of_the_machine_loses_the_last_operations_only(
    tmp_path, monkeypatch, small_shards
):
    path = tmp_path / "bank"
    bank = new_bank(path)
    states = [rows_of(bank)]
    with monkeypatch.context() as patch:
        crashes = Crashes(patch, path, tmp_path / "copies", power=True)
        crashes.synced = {file.stat().st_ino: file.stat().st_size for file in path.iterdir()}
        for number in range(3):
            for ids in ([number], [number + 4, number + 8]):
                bank.write(torch.tensor(ids), torch.randn(len(ids), 3))
                states.append(rows_of(bank))
            bank.save()
    oldest = 0
    for state in crashes.states:
        found = states.index(rows_of(MemoryBank.load(state)))
        assert found >= oldest  # what was there at an earlier crash is there at a later one
        oldest = found
    assert oldest == len(states) - 1


@pytest.mark.parametrize("table", ["keys", "values"])
def test_rows_that_are_no_numbers_are_not_saved(tmp_path, table):
    bank = fill(new_bank(tmp_path / "bank"))
    bank.save()
    with torch.no_grad():
        getattr(bank, table)[3, 1] = torch.nan
    for save in (bank.save, lambda: bank.save(tmp_path / "saved")):
        with pytest.raises(
            BankError, match=f"the bank cannot be saved: {table} of row 3 hold NaN or infinity"
        ):
            save()
    assert not (tmp_path / "saved").exists()
    bank.write(torch.tensor([3]), torch.ones(1, 3), torch.ones(1, 2))
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_logs_must_go_on_from_one_another(tmp_path, monkeypatch):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(1, 3))
    with monkeypatch.context() as patch:
        fail_at(patch, folder, "replace_file", 0, errno.ENOSPC)
        with pytest.raises(BankError):
            bank.save()
    bank.append(torch.randn(1, 3))
    bank.close()
    first, second = (tmp_path / "bank" / f"log-0000000{number}" for number in range(2))
    assert verify_folder(tmp_path / "bank").operations == 2
    size = first.stat().st_size
    os.truncate(first, size - 1)
    with (
        pytest.warns(UserWarning, match="log-00000000 has a torn tail"),
        pytest.raises(DamagedError, match="log-00000001: the record at byte 0: it has number 2"),
    ):
        MemoryBank.load(tmp_path / "bank")
    second.unlink()
    with pytest.warns(UserWarning, match=r"log-00000000 has a torn tail"):
        assert len(rows_of(MemoryBank.load(tmp_path / "bank"))) == 0


def begin_in_vain(bank, monkeypatch, step):
    """A save whose new log fails at a step, and cannot be removed either."""

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        if step == "write":
            patch.setattr(journal, "_write_whole", lambda file, data: fail())
        elif step == "half":
            patch.setattr(
                journal, "_write_whole", lambda file, data: (os.write(file, data[:9]), fail())
            )
            patch.setattr(journal.Log, "_take_back", lambda self: None)
        else:
            patch.setattr(journal, "sync_folder", fail)
        with pytest.raises(BankError, match="Input/output error"):
            bank.save()


@pytest.mark.filterwarnings("ignore:.*torn tail")
@pytest.mark.parametrize("step", ["write", "half", "folder"])
@pytest.mark.parametrize("writes", [0, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_a_log_that_was_begun_in_vain_and_stayed_is_no_damage(
    tmp_path, monkeypatch, step, writes, torn
):
    bank = fill(new_bank(tmp_path / "bank"))
    begin_in_vain(bank, monkeypatch, step)
    left = tmp_path / "bank" / "log-00000001"
    assert left.exists()
    for _ in range(writes):
        bank.append(torch.randn(1, 3))
    expected = rows_of(bank)
    bank.close()
    if torn:
        with open(tmp_path / "bank" / "log-00000000", "ab") as file:
            file.write(b"SMBL")
    assert verify_folder(tmp_path / "bank").operations == 6 + writes
    loaded = MemoryBank.load(tmp_path / "bank")
    assert rows_of(loaded) == expected
    loaded.append(torch.randn(1, 3))
    assert rows_of(reopened(loaded, tmp_path / "bank")) == rows_of(loaded)


def test_a_log_that_was_begun_in_vain_is_begun_anew(tmp_path, monkeypatch):
    bank = fill(new_bank(tmp_path / "bank"))
    begin_in_vain(bank, monkeypatch, "folder")
    bank.append(torch.randn(1, 3))
    bank.save()
    bank.append(torch.randn(1, 3))
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_a_log_that_holds_more_than_its_beginning_was_not_given_up(tmp_path, monkeypatch):
    bank = fill(new_bank(tmp_path / "bank"))
    begin_in_vain(bank, monkeypatch, "folder")
    left = tmp_path / "bank" / "log-00000001"
    begun = left.read_bytes()
    bank.append(torch.randn(1, 3))
    bank.close()
    record = journal.encode_record(
        journal.Kind.DROP, 8, {"ids": torch.tensor([0]), "clock": torch.tensor(9)}
    )
    for more in (record, record[:40]):
        left.write_bytes(begun + more)
        with pytest.raises(DamagedError, match="log-00000001: the record at byte 0: it has number"):
            verify_folder(tmp_path / "bank")


def test_a_log_that_is_missing_among_others_is_named(tmp_path, monkeypatch):
    bank = new_bank(tmp_path / "bank")
    for _ in range(2):
        bank.append(torch.randn(1, 3))
        with monkeypatch.context() as patch:
            fail_at(patch, folder, "replace_file", 0, errno.ENOSPC)
            with pytest.raises(BankError):
                bank.save()
    bank.append(torch.randn(1, 3))
    bank.close()
    (tmp_path / "bank" / "log-00000001").unlink()
    for use in (MemoryBank.load, verify_folder):
        with pytest.raises(DamagedError, match="log-00000001: it is missing or was never begun"):
            use(tmp_path / "bank")
    assert "log-00000002" in names(tmp_path / "bank")


def test_a_forked_child_cannot_write_to_a_bank(tmp_path):
    bank = fill(new_bank(tmp_path / "bank"))
    expected, log = rows_of(bank), tmp_path / "bank" / "log-00000000"
    size = log.stat().st_size
    child = os.fork()
    if child == 0:
        refused = 0
        for change in (lambda: bank.append(torch.randn(1, 3)), bank.save):
            try:
                change()
            except BankError as error:
                refused += "belongs to process" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert log.stat().st_size == size
    assert rows_of(reopened(bank, tmp_path / "bank")) == expected
