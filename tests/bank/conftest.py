"""Fixtures of the tests of banks."""

import pytest

from sparsemem.bank import folder, shards


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 4 rows, so that small banks have several."""
    for module in (shards, folder):
        monkeypatch.setattr(module, "SHARD_ROWS", 4)
