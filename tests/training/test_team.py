import re

import pytest
import torch

from sparsemem.tasks import CopyTask
from sparsemem.training.errors import ConfigError
from sparsemem.training.team import ALONE, check_shares, share_of


def test_shares_are_contiguous_and_make_up_the_batch():
    batch = CopyTask(batch_size=6).batch(0, 2)
    shares = [share_of(batch, rank, 3) for rank in range(3)]
    assert [len(share.input) for share in shares] == [2, 2, 2]
    assert torch.equal(shares[1].target, batch.target[2:4])
    for whole, *parts in zip(batch, *shares, strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_alone():
    batch = CopyTask(batch_size=5).batch(0, 1)
    assert ALONE.share(batch) is batch
    assert ALONE.means([1.5, 2.0]) == ALONE.told((1.5, 2.0)) == [1.5, 2.0]
    assert ALONE.asked(True) is True
    assert ALONE.asked(False) is False


def test_uneven_shares_are_refused():
    check_shares(8, 4)
    message = "training.batch_size is 10, expected a multiple of the number of workers = 4"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_shares(10, 4)
    with pytest.raises(ValueError, match="batch has 5 sequences, expected a multiple of 2"):
        share_of(CopyTask(batch_size=5).batch(0, 1), 0, 2)
