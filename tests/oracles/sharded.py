"""Sharded banks in one process, and a look at all of a bank's rows, sharded or not."""

import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsemem import MemoryBank
from sparsemem.bank.book import COLUMNS
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.transport import LocalShards


def sharded(num_shards, *arguments, wire_dtype=None, **options):
    """A `ShardedBank` like `MemoryBank(*arguments)`, its shards in this process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "bank")
    ShardedBank.create(path, *arguments, num_shards=num_shards, **options)
    bank = open_bank(path, LocalShards(path), wire_dtype=wire_dtype)
    bank.folder = folder  # which goes with it
    return bank


def makers(*shards):
    """Run a test's `make(num_rows, width, ...)` as a MemoryBank, and over so many shards."""
    makes = [MemoryBank, *(partial(sharded, count) for count in shards)]
    names = ["one", *(f"{count} shards" for count in shards)]
    return pytest.mark.parametrize("make", makes, ids=names)


def whole(bank):
    """The book of all rows, column by column, and all keys, by the rows' ids."""
    if not isinstance(bank, ShardedBank):
        return bank.book, bank.keys
    shards = [home.server.bank for home in bank.shards.homes]
    names = [name for name, _ in COLUMNS]
    columns = {name: column([getattr(shard.book, name) for shard in shards]) for name in names}
    (batches,) = {int(shard.book.batches) for shard in shards}
    return SimpleNamespace(**columns, batches=batches), column([shard.keys for shard in shards])


def rows_of_tables(bank):
    """What all rows hold, table by table."""
    if not isinstance(bank, ShardedBank):
        return [table.detach() for table in bank.tables]
    shards = [home.server.bank for home in bank.shards.homes]
    return [column(parts) for parts in zip(*(shard.tables for shard in shards), strict=True)]


def column(parts):
    """One table of those of all shards."""
    table = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for shard, part in enumerate(parts):
        table[shard :: len(parts)] = part.detach()
    return table


def snapshot(bank):
    """Copies of all that a bank holds."""
    book, _ = whole(bank)
    columns = [getattr(book, name) for name, _ in COLUMNS]
    return [part.clone() for part in [*columns, *rows_of_tables(bank)]]
