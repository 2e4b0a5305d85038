"""Banks in folders: what comes back, and what a save writes."""

import copy
import os
import shutil
import threading

import pytest
import torch

from sparsemem.bank import MemoryBank, journal
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.optim import RowAdagrad
from tests.oracles.bank_state import NUM_ROWS, fill, names, new_bank, reopened, rows_of, usage_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value_width", [None, 2])
def test_a_snapshot_is_the_bank(tmp_path, dtype, value_width):
    bank = new_bank(value_width=value_width, dtype=dtype, metric="l2")
    given = {} if value_width is None else {"values": torch.randn(8, 2)}
    bank.append(torch.randn(8, 3), **given, tags=torch.arange(8), ttl=40)
    bank.freeze(torch.tensor([1, 4]))
    bank.remove(torch.tensor([5]))
    with bank.background():
        bank.read(torch.randn(5, 3), 2)
    bank.save(tmp_path / "saved")
    loaded = MemoryBank.load(tmp_path / "saved")
    assert rows_of(loaded) == rows_of(bank)
    assert usage_of(loaded) == usage_of(bank)
    assert loaded.arguments == bank.arguments
    assert (loaded.book.now, int(loaded.book.batches)) == (bank.book.now, 1)
    assert loaded.stats()["num_frozen"] == 2
    queries = torch.randn(4, 3)
    for found, expected in zip(loaded.read(queries, 3), bank.read(queries, 3), strict=True):
        assert torch.equal(found, expected)
    assert loaded.journal is None


def test_a_loaded_bank_goes_on_as_the_saved_one(tmp_path):
    bank = fill(new_bank())
    bank.read(torch.randn(3, 3), 2)
    bank.save(tmp_path / "saved")
    loaded = MemoryBank.load(tmp_path / "saved")
    for count in (2, 3, 4):  # never used rows, then removed ones, then the least recently used
        rows = torch.randn(count, 3)
        assert loaded.append(rows).tolist() == bank.append(rows).tolist()
        assert rows_of(loaded) == rows_of(bank)
    loaded.expire(), bank.expire()
    assert rows_of(loaded) == rows_of(bank)


def test_writes_are_durable_without_a_save(tmp_path):
    bank = fill(new_bank(tmp_path / "bank"))
    expected, clock = rows_of(bank), bank.book.now
    loaded = reopened(bank, tmp_path / "bank")
    assert rows_of(loaded) == expected
    assert usage_of(loaded) == usage_of(bank)
    assert loaded.book.now == clock
    assert names(tmp_path / "bank") == ["log-00000000", "manifest.json"]


def test_rows_that_gave_way_start_their_counts_anew(tmp_path):
    bank = new_bank(tmp_path / "bank", num_rows=2)
    bank.append(torch.eye(3)[:2])
    bank.read(torch.eye(3)[:2], 2)
    bank.append(torch.eye(3)[2:])
    loaded = reopened(bank, tmp_path / "bank")
    assert usage_of(loaded)[0] == usage_of(bank)[0] == (3, 1, 0)


def test_rows_whose_time_is_over_are_gone_after_a_restart_too(tmp_path):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(2, 3), ttl=2)
    bank.append(torch.randn(1, 3))
    loaded = reopened(bank, tmp_path / "bank")
    for _ in range(3):
        loaded.read(torch.randn(1, 3), 1)
    assert set(rows_of(loaded)) == {2}
    assert set(rows_of(reopened(loaded, tmp_path / "bank"))) == {2}


def test_a_durable_bank_goes_on_being_durable(tmp_path):
    bank = new_bank(tmp_path / "bank")
    for number in range(6):
        bank.append(torch.randn(1, 3))
        if number in (2, 3):
            bank.save()
        bank = reopened(bank, tmp_path / "bank")
        assert len(rows_of(bank)) == number + 1
    assert bank.journal.path == tmp_path / "bank"


def test_reads_become_durable_with_a_save(tmp_path):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(4, 3))
    bank.save()
    with bank.background():
        bank.read(torch.randn(2, 3), 3)
    expected = usage_of(bank)
    bank.save()
    loaded = reopened(bank, tmp_path / "bank")
    assert usage_of(loaded) == expected
    assert (loaded.book.now, int(loaded.book.batches)) == (2, 1)


def test_a_background_that_ends_after_a_save_is_in_the_next(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(4, 3))
    with bank.background():
        bank.read(torch.randn(2, 3), 3)
        bank.write(torch.tensor([11]), torch.randn(1, 3))
        bank.save()
    expected = usage_of(bank)
    bank.save()
    assert usage_of(reopened(bank, tmp_path / "bank")) == expected


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam, RowAdagrad])
def test_steps_of_optimisers_become_durable_with_a_save(tmp_path, small_shards, make):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(10, 3), torch.randn(10, 2))
    bank.save()
    optimiser = make(list(bank.parameters()), lr=0.1)
    bank.read(torch.randn(3, 3), 2).values.sum().backward()
    hit = bank.read(torch.randn(3, 3), 2)
    (hit.rows.sum() + hit.values.sum()).backward()
    before = rows_of(bank)
    optimiser.step()
    expected = rows_of(bank)
    assert expected != before
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == expected


@pytest.mark.parametrize("table", ["keys", "values"])
def test_what_nobody_told_of_becomes_durable_with_a_save(tmp_path, small_shards, table):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(10, 3), torch.randn(10, 2))
    bank.save()
    with torch.no_grad():
        getattr(bank, table)[7, 1] = 8.5
    expected = rows_of(bank)
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == expected


def test_a_loaded_state_becomes_durable_with_a_save(tmp_path, small_shards):
    bank, other = new_bank(tmp_path / "bank"), fill(new_bank())
    bank.append(torch.randn(1, 3))
    bank.load_state_dict(other.state_dict())
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(other)


def test_a_bank_of_another_dtype_is_saved_before_it_is_written_to(tmp_path):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(4, 3))
    bank.to(torch.float64)
    before = rows_of(bank)
    with pytest.raises(BankError, match="became float64 and was last saved as float32: expected"):
        bank.append(torch.randn(1, 3))
    assert rows_of(bank) == before
    bank.save()
    bank.append(torch.randn(1, 3, dtype=torch.float64))
    loaded = reopened(bank, tmp_path / "bank")
    assert loaded.keys.dtype == torch.float64
    assert rows_of(loaded) == rows_of(bank)


def test_an_index_is_derived_anew_from_the_rows(tmp_path):
    pytest.importorskip("faiss")
    options = {"index": "IVF4,Flat", "background": False, "exact_below": 8, "min_recall": 0.9}
    bank = new_bank(tmp_path / "bank", num_rows=400, **options)
    rows = torch.randn(300, 3)
    bank.append(rows)
    bank.save()
    bank.remove(torch.arange(50))
    loaded = reopened(bank, tmp_path / "bank")
    assert loaded.arguments == bank.arguments
    assert loaded.arguments["index"] == "IVF4,Flat"
    assert loaded.read(rows[50:], 1).ids.squeeze(1).tolist() == list(range(50, 300))
    loaded.close()


def test_a_bank_can_be_loaded_into_a_mapped_file(tmp_path):
    bank = fill(new_bank())
    bank.save(tmp_path / "saved")
    loaded = MemoryBank.load(tmp_path / "saved", storage=tmp_path / "tables")
    assert rows_of(loaded) == rows_of(bank)
    assert (tmp_path / "tables").stat().st_size == NUM_ROWS * 5 * 4


def test_a_large_empty_bank_is_small_on_the_disk(tmp_path):
    bank = MemoryBank(10_000_000, 16, path=tmp_path / "bank")
    bank.write(torch.tensor([9_999_999]), torch.ones(1, 16))
    bank.save()
    assert sum(file.stat().st_size for file in (tmp_path / "bank").iterdir()) < 10_000
    loaded = reopened(bank, tmp_path / "bank")
    assert loaded.read(torch.ones(1, 16), 1).ids.tolist() == [[9_999_999]]


def test_a_save_writes_only_what_changed(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3))
    bank.save()
    assert names(tmp_path / "bank") == [
        "log-00000001",
        "manifest.json",
        *(f"rows-0000{number}-00000001.safetensors" for number in range(3)),
        *(f"usage-0000{number}-00000001.safetensors" for number in range(3)),
    ]
    bank.write(torch.tensor([6]), torch.randn(1, 3))
    bank.save()
    changed = {file for file in names(tmp_path / "bank") if "-00000002" in file}
    assert changed == {
        "log-00000002",
        "rows-00001-00000002.safetensors",
        "usage-00001-00000002.safetensors",
    }
    bank.read(bank.keys[9:10].detach(), 1)
    bank.save()
    changed = {file for file in names(tmp_path / "bank") if "-00000003" in file}
    assert {"log-00000003", "usage-00002-00000003.safetensors"} <= changed
    assert not any(file.startswith("rows") for file in changed)
    bank.remove(torch.arange(4))
    bank.save()
    assert not any(file.startswith("rows-00000") for file in names(tmp_path / "bank"))
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_rows_that_a_log_brought_back_are_in_the_next_save(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3))
    bank = reopened(bank, tmp_path / "bank")
    bank.save()
    expected = rows_of(bank)
    assert os.stat(tmp_path / "bank" / "log-00000001").st_size < 200
    assert rows_of(reopened(bank, tmp_path / "bank")) == expected


def test_saving_to_its_own_folder_is_a_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = new_bank("bank")
    bank.append(torch.randn(2, 3))
    bank.save(tmp_path / "bank")
    assert "log-00000001" in names(tmp_path / "bank")


def test_a_snapshot_of_a_durable_bank_is_not_attached(tmp_path):
    bank = fill(new_bank(tmp_path / "bank"))
    bank.save(tmp_path / "saved")
    loaded = MemoryBank.load(tmp_path / "saved")
    loaded.append(torch.randn(1, 3))
    assert rows_of(MemoryBank.load(tmp_path / "saved")) == rows_of(bank)
    assert loaded.journal is None


def test_a_copy_of_a_bank_is_not_durable(tmp_path):
    bank = fill(new_bank(tmp_path / "bank"))
    twin = copy.deepcopy(bank)
    assert twin.journal is None
    twin.append(torch.randn(2, 3))
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank) != rows_of(twin)


def test_sync_waits_for_the_disk_and_is_remembered(tmp_path, monkeypatch):
    bank = new_bank(tmp_path / "bank", sync=True)
    bank = reopened(bank, tmp_path / "bank")
    calls, real = [], os.fsync
    monkeypatch.setattr(journal.os, "fsync", lambda file: (calls.append(file), real(file)))
    bank.append(torch.randn(1, 3))
    bank.remove(torch.tensor([0]))
    assert len(calls) == 2


def test_others_read_and_write_while_a_bank_is_saved(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank", num_rows=40)
    bank.append(torch.randn(40, 3))
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            ids = torch.randperm(40)[:3]
            bank.write(ids, torch.full((3, 3), float(number)), torch.full((3, 2), float(number)))
            if number % 7 == 0:
                bank.remove(torch.randperm(40)[:2])
            if number % 11 == 0:
                bank.freeze(bank.book.live.nonzero().squeeze(1)[:2])
                bank.unfreeze()

    def read():
        while not stop.is_set():
            bank.read(torch.randn(2, 3), 2)

    threads = [threading.Thread(target=task) for task in (write, read)]
    for thread in threads:
        thread.start()
    saved = []
    try:
        for number in range(6):
            bank.save()
            shutil.copytree(tmp_path / "bank", tmp_path / f"copy{number}")
            saved.append(tmp_path / f"copy{number}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for path in saved:  # copied while records were appended: no torn row, whatever came through
        for key, value, *_ in rows_of(MemoryBank.load(path)).values():
            assert len(set(key)) == 1 or value == (0, 0)
            assert value in ((key[0], key[0]), (0, 0))
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


# Product keys


def product_keys(path=None, **options):
    arguments = {"index": "product-key", "metric": "ip", **options}
    return MemoryBank(16, 4, 2, **arguments, path=path)


def same_bank(loaded, bank):
    assert torch.equal(loaded.keys, bank.keys)
    assert rows_of(loaded) == rows_of(bank)
    assert usage_of(loaded) == usage_of(bank)
    queries = torch.randn(3, 4)
    for found, expected in zip(loaded.read(queries, 5), bank.read(queries, 5), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("initial", ["empty", "normal"])
def test_product_keys_come_back(tmp_path, small_shards, initial):
    bank = product_keys(tmp_path / "bank", initial=initial, seed=7)
    bank.write(torch.tensor([1, 6]), values=torch.randn(2, 2), tags=3)
    bank.remove(torch.tensor([6, 7]))
    same_bank(reopened(bank, tmp_path / "bank"), bank)
    bank.save(tmp_path / "saved")
    same_bank(MemoryBank.load(tmp_path / "saved"), bank)


def test_product_keys_are_saved_when_they_were_trained(tmp_path, small_shards):
    bank = product_keys(tmp_path / "bank")
    saved = set(names(tmp_path / "bank"))
    assert saved == {"keys-00000000.safetensors", "log-00000000", "manifest.json"}
    optimiser = torch.optim.SGD(bank.parameters(), lr=0.1)
    hit = bank.read(torch.randn(3, 4), 5)
    (hit.scores.sum() + hit.values.sum()).backward()
    optimiser.step()
    bank.remove(torch.arange(8, 12))  # a shard of nothing, which a new bank has not
    bank.save()
    assert names(tmp_path / "bank")[0] == "keys-00000001.safetensors"
    assert "rows-00002-00000001.safetensors" in names(tmp_path / "bank")
    same_bank(reopened(bank, tmp_path / "bank"), bank)


def test_damaged_product_keys_are_refused(tmp_path):
    product_keys().save(tmp_path / "saved")
    file = tmp_path / "saved" / "keys-00000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"keys-00000000.safetensors is damaged: its sha256"):
        MemoryBank.load(tmp_path / "saved")


def test_product_keys_that_are_no_numbers_are_not_saved(tmp_path):
    bank = product_keys()
    with torch.no_grad():
        bank.keys[1, 2, 0] = torch.inf
    with pytest.raises(BankError, match="cannot be saved: keys of row 1 hold NaN or infinity"):
        bank.save(tmp_path / "saved")
