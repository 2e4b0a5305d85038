"""What the command line does about shards before Ray is needed."""

import sys

import pytest

from sparsemem.distributed.cluster import Wanted
from sparsemem.distributed.commands import launching, wanted
from sparsemem.distributed.keeper import BANK
from sparsemem.distributed.trying import create_bank
from sparsemem.errors import UserError
from sparsemem.training.run import RunFolder
from tests.oracles.sharded_runs import config_of


def test_without_options_there_are_no_shards():
    assert wanted(None, None) is None
    assert wanted(4, None) == Wanted(4, 1, None)
    assert wanted(4, 2, "auto") == Wanted(4, 2, "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, 2), "--workers is 2, expected it beside --shards"),
        ((None, None, "auto"), "--address is auto, expected it beside --shards"),
    ],
)
def test_options_that_need_shards(options, message):
    with pytest.raises(UserError, match=message):
        wanted(*options)


def test_a_run_knows_its_shards(tmp_path):
    run = RunFolder.create(tmp_path / "run", config_of())
    with pytest.raises(UserError, match=r"--shards is 2, but run .* has none"):
        wanted(2, None, None, run)
    assert wanted(None, None, None, run) is None
    create_bank(run.path / BANK, config_of(), 3)
    assert wanted(None, 2, None, run) == Wanted(3, 2, None)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "sparsemem.distributed.launch", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray and Ray Train \(.*ray.*\): pip install"):
        launching()
