"""Opening a sharded bank's folder, of whichever kind it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.home import read_manifest
from sparsemem.distributed.product_keys import ShardedProductKeys
from sparsemem.distributed.transport import Transport


def open_bank(path: str | Path, shards: Transport, **options: Any) -> ShardedBank:
    """The bank in a folder that `ShardedBank.create` has made, over its shards.

    A `ShardedProductKeys` where it is indexed by product keys. BankError where there is none.

    Args:
        path: the folder.
        shards, options: as for `ShardedBank`.
    """
    has_product_keys = read_manifest(Path(path)).product_width is not None
    kind = ShardedProductKeys if has_product_keys else ShardedBank
    return kind(path, shards, **options)
