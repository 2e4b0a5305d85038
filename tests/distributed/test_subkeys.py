"""Sub-keys of product keys over shards in versions, folders opened again, and other shards."""

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.distributed.product_keys import ShardedProductKeys
from sparsemem.distributed.reshard import reshard
from sparsemem.distributed.transport import LocalShards
from sparsemem.distributed.versions import read_version
from sparsemem.optim import RowAdamW
from tests.oracles.product_keys import WIDTH, is_same, pair, random, read_both, step
from tests.oracles.sharded import snapshot


def test_versions_hold_sub_keys_and_values():
    _, bank = pair(3)
    first = step(bank, 1)
    written = []
    bank.save(written.append)
    second = step(bank, 2)
    bank.save(keep=written)
    third = step(bank, 3)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(second[0], third[0])
    plain = read_version(bank.path)
    assert is_same(second, [plain.keys, *snapshot(plain)])
    assert read_version(bank.path, written[0]).keys.equal(first[0])
    bank.restore()
    assert is_same(second, [bank.keys, *snapshot(bank)])
    bank.restore(written[0])
    assert is_same(first, [bank.keys, *snapshot(bank)])
    assert is_same(step(bank, 2), second)  # as if nothing had happened since
    bank.save()
    assert [file.name for file in bank.path.glob("subkeys-*")] == [
        f"subkeys-{version}.safetensors" for version in bank.versions
    ]


def test_a_folder_that_is_opened_again_goes_on():
    _, bank = pair(3)
    step(bank, 1)
    bank.save()
    saved, later = bank.keys.detach().clone(), step(bank, 2)
    bank.close()
    again = ShardedProductKeys(bank.path, LocalShards(bank.path))
    assert is_same(later[1:], snapshot(again))  # what shards have answered
    assert torch.equal(again.keys, saved)  # sub-keys are those of the version
    again.restore()
    assert not is_same(later[1:], snapshot(again))
    again.close()


def test_a_save_that_failed_leaves_the_version_before(plain_errors):
    _, bank = pair(2)
    before = [bank.keys.detach().clone(), *snapshot(bank)]

    def fails(version):
        raise RuntimeError("no")

    step(bank, 1)
    with pytest.raises(RuntimeError, match="no"):
        bank.save(fails)
    with torch.no_grad():
        bank.keys[1, 2, 0] = torch.nan
    with pytest.raises(BankError, match="sub-keys hold NaN or infinity"):
        bank.save()
    assert bank.versions == (0,)
    bank.restore()
    assert is_same(before, [bank.keys, *snapshot(bank)])


def test_sub_keys_that_are_missing_or_damaged_are_told(plain_errors):
    _, bank = pair(2)
    place = bank.path / "subkeys-0.safetensors"
    whole = place.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 1
    for torn in (whole[:40], whole[:-4], bytes(changed), b""):
        place.write_bytes(torn)
        with pytest.raises(DamagedError, match=r"subkeys-0.safetensors is damaged"):
            ShardedProductKeys(bank.path, bank.shards)
    place.unlink()
    rows = snapshot(bank)
    for look in (bank.restore, lambda: read_version(bank.path)):
        with pytest.raises(BankError, match=r"cannot read .*subkeys-0.safetensors: No such file"):
            look()
    assert is_same(rows, snapshot(bank))


def test_resharding_keeps_all(tmp_path):
    one, bank = pair(3)
    optimisers = [RowAdamW([each.keys, each.values], lr=0.1) for each in (one, bank)]
    for seed in range(2):
        expected, found = map(step, (one, bank), (seed, seed), optimisers)
        assert is_same(expected, found)
    bank.save()
    bank.close()
    path = reshard(bank.path, tmp_path / "two", 2)
    two = ShardedProductKeys(path, LocalShards(path))
    assert is_same(expected, [two.keys, *snapshot(two)])
    two.close()
    plain = MemoryBank.load(reshard(path, tmp_path / "plain", None))
    assert plain.has_product_keys
    assert is_same(expected, [plain.keys, *snapshot(plain)])
    path = reshard(tmp_path / "plain", tmp_path / "four", 4)
    four = ShardedProductKeys(path, LocalShards(path))
    assert is_same(expected, [four.keys, *snapshot(four)])
    read_both((one, four), random(3, WIDTH))
    four.close()
