"""Sharded banks in one process, and a look at all of a bank's rows, sharded or not."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

from sparsemem.bank.book import COLUMNS
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.transport import LocalShards


def sharded(num_shards, *arguments, **options):
    """A `ShardedBank` like `MemoryBank(*arguments)`, its shards in this process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "bank")
    ShardedBank.create(path, *arguments, num_shards=num_shards, **options)
    bank = ShardedBank(path, LocalShards(path))
    bank.folder = folder  # which goes with it
    return bank


def whole(bank):
    """The book of all rows, column by column, and all keys, by the rows' ids."""
    if not isinstance(bank, ShardedBank):
        return bank.book, bank.keys
    shards = [home.server.bank for home in bank.shards.homes]

    def column(parts):
        table = parts[0].new_empty(bank.num_rows, *parts[0].shape[1:])
        for shard, part in enumerate(parts):
            table[shard :: len(parts)] = part.detach()
        return table

    names = [name for name, _ in COLUMNS]
    columns = {name: column([getattr(shard.book, name) for shard in shards]) for name in names}
    return SimpleNamespace(**columns), column([shard.keys for shard in shards])
