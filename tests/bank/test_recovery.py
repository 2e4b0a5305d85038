"""What is not a whole bank is refused by name, before anything is built."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.bank import MemoryBank, journal, manifest, recovery, shards
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.manifest import encode_manifest, read_manifest
from sparsemem.bank.recovery import verify_folder
from tests.oracles.bank_state import NUM_ROWS, fill, names, new_bank, reopened, rows_of


def test_a_place_that_is_taken_is_refused_before_anything_is_made(tmp_path):
    fill(new_bank(tmp_path / "bank"))
    bank = fill(new_bank())
    for make in (
        lambda: new_bank(tmp_path / "bank", storage=tmp_path / "tables"),
        lambda: bank.save(tmp_path / "sub" / ".." / "bank"),
    ):
        with pytest.raises(BankError, match=r"bank holds a bank already: MemoryBank.load\(path\)"):
            make()
    assert not (tmp_path / "tables").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(BankError, match="other is there already, expected a new or an empty"):
        bank.save(tmp_path / "other")
    with pytest.raises(BankError, match="notes is there already"):
        bank.save(tmp_path / "other" / "notes")
    assert (tmp_path / "other" / "notes").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    bank.save(tmp_path / "empty")
    assert rows_of(MemoryBank.load(tmp_path / "empty")) == rows_of(bank)


def test_a_bank_without_a_folder_asks_for_one():
    with pytest.raises(ValueError, match="path is None, expected a new folder"):
        new_bank().save()


def test_a_bank_is_open_once(tmp_path):
    bank = new_bank(tmp_path / "bank")
    for use in (MemoryBank.load, verify_folder):
        with pytest.raises(BankError, match="bank is in use: another bank, in this process or"):
            use(tmp_path / "bank")
    bank.append(torch.randn(1, 3))
    del bank  # lets go of it, too
    assert len(rows_of(MemoryBank.load(tmp_path / "bank"))) == 1


def test_a_save_just_before_a_folder_is_claimed_is_seen(tmp_path, monkeypatch):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(2, 3))
    claim = recovery.claim

    def late(path):
        bank.save()
        bank.close()
        return claim(path)

    monkeypatch.setattr(recovery, "claim", late)
    assert rows_of(MemoryBank.load(tmp_path / "bank")) == rows_of(bank)


def test_a_closed_bank_takes_no_writes(tmp_path):
    bank = fill(new_bank(tmp_path / "bank"))
    before = rows_of(bank)
    bank.close()
    for write in (
        lambda: bank.append(torch.randn(1, 3)),
        lambda: bank.remove(torch.tensor([0])),
        lambda: bank.freeze(torch.tensor([0])),
        bank.save,
    ):
        with pytest.raises(BankError, match=r"bank was closed: MemoryBank.load opens it again"):
            write()
    assert rows_of(bank) == before
    bank.close()


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(BankError, match=r"nowhere is no bank: there is no manifest.json in it"):
        MemoryBank.load(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"format": "sparsemem checkpoint", "version": 1}')
    with pytest.raises(BankError, match="is not the manifest of a sparsemem bank"):
        MemoryBank.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2")
    with pytest.raises(DamagedError, match=r"manifest.json is damaged: expected a JSON object"):
        MemoryBank.load(tmp_path)


def change_manifest(path, **changes):
    """Another manifest with a right checksum."""
    old = read_manifest(path)
    (path / "manifest.json").write_bytes(encode_manifest(old.model_copy(update=changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has format version 2, expected 1"),
        ({"save": -1}, "is not of this version of sparsemem: save: Input should be greater"),
        ({"bank": "x"}, "is not of this version of sparsemem: bank: "),
        ({"save": 5}, r"cannot read .*log-00000005: No such file"),
        ({"sequence": 7}, "log-00000000: the record at byte 0: it has number 0, expected 7"),
        ({"bank": "0" * 32}, "log-00000000: the record at byte 0: the log is another bank's"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, changes, message):
    fill(new_bank(tmp_path / "bank")).close()
    change_manifest(tmp_path / "bank", **changes)
    with pytest.raises(BankError, match=message):
        MemoryBank.load(tmp_path / "bank")


def test_arguments_that_make_no_bank_are_refused(tmp_path):
    new_bank(tmp_path / "bank").close()
    arguments = read_manifest(tmp_path / "bank").arguments
    change_manifest(tmp_path / "bank", arguments=arguments.model_copy(update={"index": "magic"}))
    with pytest.raises(BankError, match="cannot be made as its manifest has it: index is 'magic'"):
        MemoryBank.load(tmp_path / "bank")


def test_no_file_outside_the_folder_is_ever_read(tmp_path):
    bank = fill(new_bank())
    bank.save(tmp_path / "saved")
    (shard,) = read_manifest(tmp_path / "saved").rows
    bad = shard.model_copy(update={"file": "../rows-00000-00000000.safetensors"})
    change_manifest(tmp_path / "saved", rows=[bad])
    with pytest.raises(BankError, match=r"rows.0.file: String should match"):
        MemoryBank.load(tmp_path / "saved")


def test_a_missing_or_torn_file_is_named_before_anything_is_read(tmp_path, monkeypatch):
    fill(new_bank()).save(tmp_path / "saved")
    monkeypatch.setattr(shards, "read_file", None)
    file = tmp_path / "saved" / "usage-00000-00000000.safetensors"
    os.truncate(file, 10)
    with pytest.raises(DamagedError, match=f"{file.name} is torn: 10 bytes, expected"):
        MemoryBank.load(tmp_path / "saved")
    file.unlink()
    with pytest.raises(DamagedError, match=f"cannot read .*{file.name}: No such file"):
        MemoryBank.load(tmp_path / "saved")


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """A closed durable bank with shards and a log."""
    path = tmp_path_factory.mktemp("whole") / "bank"
    bank = fill(new_bank(path))
    bank.save()
    fill(bank)
    bank.close()
    return path


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_anywhere_is_refused_with_the_name_of_the_file(
    whole_folder, tmp_path, data
):
    path = tmp_path / "bank"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole_folder, path)
    file = path / data.draw(st.sampled_from(names(path)))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    for use in (MemoryBank.load, verify_folder):
        with pytest.raises(BankError, match=file.name):
            use(path)


def test_the_whole_folder_is_whole(whole_folder):
    summary = verify_folder(whole_folder)
    assert (summary.operations, len(summary.manifest.files)) == (6, 2)


@pytest.mark.parametrize(
    ("kind", "arrays", "message"),
    [
        ("DROP", {"ids": torch.tensor([NUM_ROWS])}, "ids are not ascending row numbers from 0"),
        ("DROP", {"ids": torch.tensor([1, 1])}, "ids are not ascending"),
        ("DROP", {"ids": torch.tensor([[1]])}, "expected `ids`"),
        ("DROP", {"ids": torch.tensor([1]), "clock": torch.tensor([1])}, "expected `clock`"),
        ("DROP", {"ids": torch.tensor([1]), "tags": torch.tensor([1])}, r"expected \['ids'\]"),
        ("FLAG", {"ids": torch.tensor([1])}, r"expected \['frozen', 'ids'\]"),
        ("PUT", {"ids": torch.tensor([1]), "keys": torch.zeros(1, 3)}, "expected .*'expiry'"),
        (
            "PUT",
            {
                "ids": torch.tensor([1]),
                "keys": torch.tensor([[0, torch.inf, 0]]),
                "tags": torch.tensor([1]),
                "expiry": torch.tensor([1]),
            },
            "keys of row 1 hold NaN or infinity",
        ),
    ],
)
def test_operations_on_another_bank_are_refused_with_their_place(tmp_path, kind, arrays, message):
    bank = new_bank(tmp_path / "bank")
    log = bank.journal._log
    log.append(journal.Kind[kind], {"clock": torch.tensor(1), **arrays})
    bank.close()
    for use in (MemoryBank.load, verify_folder):
        with pytest.raises(BankError, match=f"log-00000000: the record at byte [0-9]+.*{message}"):
            use(tmp_path / "bank")


def test_a_manifest_is_json_whose_checksum_is_that_of_its_bytes(tmp_path):
    fill(new_bank()).save(tmp_path / "saved")
    data = (tmp_path / "saved" / "manifest.json").read_bytes()
    body = json.loads(data)
    blank = data.replace(body["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == body["sha256"]
    assert (body["format"], body["version"]) == (manifest.FORMAT, 1)


def test_a_log_that_was_never_begun_is_left_out(tmp_path):
    bank = fill(new_bank(tmp_path / "bank"))
    bank.close()
    (tmp_path / "bank" / "log-00000001").write_bytes(b"SMBL")
    with pytest.warns(UserWarning, match="log-00000001 has a torn tail: the 4 bytes from byte 0"):
        loaded = MemoryBank.load(tmp_path / "bank")
    assert rows_of(loaded) == rows_of(bank)
    assert not (tmp_path / "bank" / "log-00000001").exists()
    loaded.save()
    assert rows_of(reopened(loaded, tmp_path / "bank")) == rows_of(bank)


def test_leftovers_go_and_other_files_stay(tmp_path):
    bank = new_bank(tmp_path / "bank")
    bank.save()
    bank.close()
    for name in ("rows-00007-00000009.safetensors", "log-00000000", ".manifest.json.part", "mine"):
        (tmp_path / "bank" / name).write_text("x")
    MemoryBank.load(tmp_path / "bank")
    assert names(tmp_path / "bank") == ["log-00000001", "manifest.json", "mine"]
