"""The format is what docs/bank-format.md says: a reader written from it reads what banks write."""

import pytest
import torch

from sparsemem.bank import MemoryBank, folder
from sparsemem.bank.errors import BankError
from tests.oracles.bank_reader import read_folder, read_manifest
from tests.oracles.bank_state import NUM_ROWS, fill, new_bank, rows_of, usage_of


def check(path, bank):
    live, usage = read_folder(path)
    expected = rows_of(bank)
    assert live.keys() == expected.keys()
    for row, (key, value, frozen, tag, expiry) in expected.items():
        assert tuple(live[row]["keys"]) == key
        assert tuple(live[row].get("values", live[row]["keys"])) == value
        found = (live[row]["frozen"], live[row]["tags"], live[row]["expiry"])
        assert found == (frozen, tag, expiry)
    found = {
        row: (known["last_access"], known["accesses"], known["background"])
        for row, known in usage.items()
    }
    assert found == usage_of(bank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value_width", [None, 2])
def test_a_snapshot_as_the_format_has_it(tmp_path, dtype, value_width):
    bank = new_bank(value_width=value_width, dtype=dtype)
    bank.append(torch.randn(8, 3), tags=torch.arange(8), ttl=40)
    bank.remove(torch.tensor([5]))
    bank.freeze(torch.tensor([1, 4]))
    with bank.background():
        bank.read(torch.randn(5, 3), 2)
    bank.save(tmp_path / "saved")
    check(tmp_path / "saved", bank)
    manifest = read_manifest(tmp_path / "saved")
    assert next(iter(manifest)) == "sha256"
    assert manifest["clock"] == bank.book.now == 2
    assert (manifest["version"], manifest["batches"], manifest["keys"]) == (1, 1, None)
    assert manifest["arguments"] == bank.arguments


def test_shards_and_logs_as_the_format_has_them(tmp_path):
    path = tmp_path / "bank"
    bank = fill(new_bank(path, num_rows=200_000))
    check(path, bank)
    bank.write(torch.tensor([199_999, 70_000]), torch.randn(2, 3), torch.randn(2, 2))
    bank.read(torch.randn(2, 3), 3)
    bank.save()
    check(path, bank)
    assert [shard["shard"] for shard in read_manifest(path)["rows"]] == [0, 1, 3]
    bank.remove(torch.tensor([199_999]))
    bank.unfreeze()
    bank.write(torch.tensor([3]), tags=77)
    check(path, bank)


def test_rows_that_gave_way_and_a_save_that_failed_as_the_format_has_them(tmp_path, monkeypatch):
    path = tmp_path / "bank"
    bank = fill(new_bank(path))
    bank.append(torch.randn(NUM_ROWS - 2, 3))
    with monkeypatch.context() as patch:
        patch.delattr(folder, "replace_file")
        with pytest.raises(NameError):
            bank.save()
    bank.append(torch.randn(3, 3))
    assert len(list(path.glob("log-*"))) == 2
    check(path, bank)
    bank.close()
    check(path, MemoryBank.load(path))


def test_a_later_version_is_refused(tmp_path):
    new_bank().save(tmp_path / "saved")
    file = tmp_path / "saved" / "manifest.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(BankError, match="has format version 2, expected 1"):
        MemoryBank.load(tmp_path / "saved")
