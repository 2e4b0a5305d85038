"""What a bank takes: memory and disk of its rows, from those of a few."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.manifest import Arguments
from sparsemem.bank.shards import SHARD_ROWS, Layout
from sparsemem.indexes.derivation import MOST_STRAYS
from sparsemem.indexes.device_derived import derived_bytes, entry_bytes
from sparsemem.indexes.device_faiss import TEMPORARY_BYTES, GpuEngine, is_served
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY
from sparsemem.indexes.fresh import DEVICE_BUFFER_ROWS, DEVICE_EXACT_BELOW, FreshIndex
from sparsemem.indexes.upkeep import LENIENT, STALE
from sparsemem.optim.base import RowOptimizer
from sparsemem.training.banks import make_bank
from sparsemem.training.config import Bank, Config
from sparsemem.training.optimisers import make_row_optimiser

FEW_ROWS = 1024  # that are made to see what a row takes; a square number, for product keys
PROBE_ROWS = 65_536  # of a bank that a probing pass reads; a square number, too
INDEX_ROW_BYTES = 32  # of a row in a FAISS index beside its numbers: ids, labels, places
ID_BYTES = 8


class BankBytes(NamedTuple):
    """Bytes of a bank, once all of its rows have been read and stepped."""

    rows: int  # tables, and what is known of each row
    derived: int  # the index, where the rows are
    optimiser: int  # state of the row optimiser
    snapshot: int  # in a checkpoint
    saving: int  # beside all that, while a checkpoint is written
    on_host: int = 0  # the index, where FAISS has it on the host and the rows are elsewhere


class SubKeyBytes(NamedTuple):
    """Bytes of the sub-keys of product keys, of which the square root of the rows make these."""

    keys: int
    optimiser: int  # state of the row optimiser, which steps them whole


NOTHING = BankBytes(0, 0, 0, 0, 0)


def bank_bytes(config: Config, device: str = "cpu", here: bool = True) -> BankBytes:
    """What the bank of a config takes on a type of device, which may be elsewhere, if it has one.

    Nothing of its size is made. A FAISS index on the host is counted as one of whole rows, and
    twice: it is trained anew beside the old one.
    """
    if config.bank is None:
        return NOTHING
    few, sub_keys = _few_rows(config), sub_key_bytes(config)
    scale = config.bank.num_rows / few.num_rows
    of_rows = [*few.tables, *(column for column in few.book.buffers() if column.ndim)]
    state, _ = _state_bytes(config, few)
    derived, on_host = _index_bytes(config.bank, few, device, here)
    layout = Layout.of(Arguments(**few.arguments))
    row = sum(
        ID_BYTES
        + sum(dtype.itemsize * (shape[0] if shape else 1) for dtype, shape in part.values())
        for part in (layout.rows, layout.usage)
    )
    snapshot = config.bank.num_rows * row + sub_keys.keys
    # One shard of the rows at a time: a copy, and the file.
    shard = 2 * min(config.bank.num_rows, SHARD_ROWS) * row
    return BankBytes(
        rows=int(_sum(of_rows) * scale) + sub_keys.keys,
        derived=derived,
        optimiser=int(state * scale) + sub_keys.optimiser,
        snapshot=int(snapshot),
        saving=int(shard),
        on_host=on_host,
    )


def _index_bytes(bank: Bank, few: MemoryBank, device: str, here: bool) -> tuple[int, int]:
    """Bytes of a bank's index: where the rows are, and on the host where they are not."""
    if bank.index in (EXACT, PRODUCT_KEY):
        return 0, 0
    on_host = 2 * bank.num_rows * (4 * bank.width + INDEX_ROW_BYTES)
    if device == "cpu":
        return on_host, 0
    finds_gpu = GpuEngine.there() or not here  # where a GPU is, FAISS is taken to be there, too
    if device == "cuda" and finds_gpu and is_served(bank.index):
        return _gpu_index_bytes(bank, few), 0
    return 0, on_host


def _gpu_index_bytes(bank: Bank, few: MemoryBank) -> int:
    """Bytes of a FAISS index on a GPU, while others are trained beside lists that are worn.

    As many of the worn lists' entries are stale as call for new ones. Beside both lists as many
    rows stray and wait as may beside the worn ones; how many change while lists are trained depends
    on the time that takes. What FAISS keeps free in its lists is not counted.
    """
    index, rows = few.index, bank.num_rows
    assert isinstance(index, FreshIndex)
    if rows < (bank.exact_below or max(DEVICE_EXACT_BELOW, index.exact_below)):
        return 0  # all searches are scans
    waiting = LENIENT * (bank.buffer_rows or DEVICE_BUFFER_ROWS)
    most = min(rows, int(MOST_STRAYS * rows) + waiting)
    entry = entry_bytes(bank.index, bank.width, index.metric)
    held = sum(
        derived_bytes(rows, bank.width * few.keys.element_size(), entry, entries, most)
        for entries in (rows, rows + int(STALE * rows))
    )
    return held + 2 * TEMPORARY_BYTES + ID_BYTES * rows  # ids of live rows, while they are entered


def sub_key_bytes(config: Config) -> SubKeyBytes:
    """What the sub-keys of a config's bank take; nothing where it has none."""
    if config.bank is None or config.bank.index != PRODUCT_KEY:
        return SubKeyBytes(0, 0)
    few = _few_rows(config)
    pairs = (config.bank.num_rows / few.num_rows) ** 0.5  # sub-keys make rows by pairs
    _, state = _state_bytes(config, few)
    return SubKeyBytes(int(few.keys.nbytes * pairs), int(state * pairs))


def probe_bank(
    config: Config, num_rows: int, device: torch.device, indexed: bool = False
) -> MemoryBank | None:
    """A bank like the config's, of at most so many rows, for a pass that shows what reading takes.

    indexed: with its FAISS index, built here and now, for a pass that is timed; else the search is
    exact, which takes at least as much memory.
    """
    if config.bank is None:
        return None
    options: dict[str, Any] = {"background": None, "buffer_rows": None, "exact_below": None}
    if config.bank.index == PRODUCT_KEY:
        options = {}
    elif config.bank.index == EXACT or not indexed:
        options["index"] = EXACT
    else:
        options = {"background": False}
    bank = config.bank.model_copy(update=options)
    place = None if device.type == "meta" else device
    changed = config.model_copy(update={"bank": bank})
    return make_bank(changed, num_rows=_few(config, num_rows), device=place)


def _few_rows(config: Config) -> MemoryBank:
    """A bank like the config's, by which rows are measured."""
    return make_bank(config, num_rows=_few(config, FEW_ROWS), initial="empty")


def _few(config: Config, most: int) -> int:
    """A number of rows of at most `most`: with product keys a square one, as both of these are."""
    assert config.bank is not None
    few = min(config.bank.num_rows, most)
    return math.isqrt(few) ** 2 if config.bank.index == PRODUCT_KEY else few


def _state_bytes(config: Config, few: MemoryBank) -> tuple[int, int]:
    """Bytes of the row optimiser's state: of tables, and of sub-keys."""
    assert config.bank is not None
    made = make_row_optimiser(config.bank.optimizer, few.parameters(recurse=False))
    optimiser = cast(RowOptimizer, made)
    (group,) = optimiser.param_groups
    tables, sub_keys = 0, 0
    for parameter in group["params"]:
        is_table = any(parameter is table for table in few.tables)
        size = _sum(optimiser._zero_state(parameter, is_table, group).values())
        tables, sub_keys = (tables + size, sub_keys) if is_table else (tables, sub_keys + size)
    return tables, sub_keys


def _sum(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
