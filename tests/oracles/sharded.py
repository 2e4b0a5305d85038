"""Sharded banks in one process, and a look at all of a bank's rows, sharded or not."""

from types import SimpleNamespace

import torch

from sparsemem.bank.book import COLUMNS
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.placement import Placement
from sparsemem.distributed.server import ShardServer
from sparsemem.distributed.shard import ShardBank
from sparsemem.distributed.transport import LocalShards


def sharded(num_shards, num_rows, width, value_width=None, *, metric="cosine", **options):
    """A `ShardedBank` like `MemoryBank(num_rows, ...)`, its shards in this process."""
    placement = Placement.of(num_rows, num_shards)
    servers = [
        ShardServer(
            ShardBank(placement.rows_of(shard), width, value_width, metric=metric, **options)
        )
        for shard in range(num_shards)
    ]
    dtype = options.get("dtype", torch.float32)
    return ShardedBank(
        LocalShards(servers), num_rows, width, value_width, metric=metric, dtype=dtype
    )


def whole(bank):
    """The book of all rows, column by column, and all keys, by the rows' ids."""
    if not isinstance(bank, ShardedBank):
        return bank.book, bank.keys
    shards = [server.bank for server in bank.shards.servers]

    def column(parts):
        table = parts[0].new_empty(bank.num_rows, *parts[0].shape[1:])
        for shard, part in enumerate(parts):
            table[shard :: len(parts)] = part.detach()
        return table

    names = [name for name, _ in COLUMNS]
    columns = {name: column([getattr(shard.book, name) for shard in shards]) for name in names}
    return SimpleNamespace(**columns), column([shard.keys for shard in shards])
