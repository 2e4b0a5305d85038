import pytest

from sparsemem.bank.errors import BankError
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.product_keys import ShardedProductKeys
from sparsemem.distributed.transport import LocalShards


@pytest.mark.parametrize(
    ("index", "kind"), [("exact", ShardedBank), ("product-key", ShardedProductKeys)]
)
def test_a_folder_says_which_bank_it_is_of(tmp_path, index, kind):
    path = ShardedBank.create(tmp_path / "bank", 25, 6, 3, num_shards=2, index=index, metric="ip")
    bank = open_bank(path, LocalShards(path), worker=1, num_workers=2)
    assert type(bank) is kind
    assert (bank.worker, bank.num_workers) == (1, 2)
    bank.close()


def test_a_folder_without_a_bank_is_refused(tmp_path, plain_errors):
    with pytest.raises(BankError, match=r"cannot read .*manifest.json"):
        open_bank(tmp_path, None)
