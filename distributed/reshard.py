"""Reshard: the rows of a bank, sharded or not, in a new folder with other shards, or without.

What a row is goes with it: contents, usage, tag, expiry, whether it is frozen, and what its
optimisers know of it. What clients were told stays behind: they begin anew.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsemem.bank import MemoryBank
from sparsemem.bank.book import COLUMNS
from sparsemem.bank.errors import write_errors
from sparsemem.bank.folder import check_new_place
from sparsemem.bank.manifest import MANIFEST, Arguments
from sparsemem.bank.recovery import open_folder, read_bank
from sparsemem.bank.tables import RAM
from sparsemem.distributed.home import (
    Manifest,
    checkpoint_at,
    claim_shard,
    folder_of,
    lay_out,
    read_history,
    read_manifest,
    read_server,
)
from sparsemem.distributed.placement import Placement
from sparsemem.distributed.server import ShardServer
from sparsemem.distributed.subkeys import of_pairs, of_values
from sparsemem.files import new_folder

FIRST = 1  # version of a bank that is made of another


class States(NamedTuple):
    """What a row optimiser knows of all rows."""

    options: dict[str, Any]
    rows: dict[str, Tensor]


class Whole:
    """All that a bank holds, by row id."""

    def __init__(self, arguments: Arguments, sync: bool) -> None:
        self.arguments, self.num_rows, self.sync = arguments, arguments.num_rows, sync
        self.columns: dict[str, Tensor] = {}
        self.subkeys: Tensor | None = None  # with product keys: then the rows are the values
        self.states: dict[str, States] = {}
        self.clock = self.batches = self.last_written = 0

    def given(self) -> dict[str, Any]:
        """What its bank is made with, beside the number of rows; as JSON has it."""
        return {k: v for k, v in self.arguments.model_dump().items() if k != "num_rows"}

    def enter(self, bank: MemoryBank, every: slice) -> None:
        """Take in a bank whose rows are those at `every` such id."""
        for name, column in columns_of(bank):
            put(self.columns, name, column, every, self.num_rows)
        book = bank.book
        self.clock = max(self.clock, book.now)
        self.batches = max(self.batches, int(book.batches))
        self.last_written = max(self.last_written, book.last_written)

    def enter_states(self, server: ShardServer, every: slice) -> None:
        """Take in what a shard's optimisers know. Of rows that one has not stepped: zeros."""
        for name, optimiser in server.optimisers():
            (group,) = optimiser.param_groups
            options = {key: value for key, value in group.items() if key != "params"}
            whole = self.states.setdefault(name, States(options, {}))
            for state in optimiser.state.values():
                for key, rows in state.items():
                    put(whole.rows, key, rows, every, self.num_rows)

    def fill(self, bank: MemoryBank, every: slice) -> None:
        """Give a bank its rows."""
        with torch.no_grad():
            for name, column in columns_of(bank):
                column.copy_(self.columns[name][every])
            bank.book.clock.fill_(self.clock)
            bank.book.batches.fill_(self.batches)
            bank.rebind()
        bank.book.last_written = self.last_written

    def fill_states(self, server: ShardServer, every: slice) -> None:
        """Give a shard its optimisers."""
        for name, (options, rows) in self.states.items():
            own = {key: table[every] for key, table in rows.items()}
            state = {0: own} if own else {}
            group = {**options, "params": [0]}
            server.load_optimiser(name, {"state": state, "param_groups": [group]})


def columns_of(bank: MemoryBank) -> Iterator[tuple[str, Tensor]]:
    """The tables, and the columns of the book."""
    for name, table in zip(("keys", "values"), bank.tables, strict=False):
        yield name, table.data
    for name, _ in COLUMNS:
        yield name, getattr(bank.book, name)


def put(tables: dict[str, Tensor], name: str, rows: Tensor, every: slice, num_rows: int) -> None:
    """Enter rows into a table of all rows."""
    if name not in tables:
        tables[name] = rows.new_zeros(num_rows, *rows.shape[1:])
    tables[name][every] = rows


def every(shard: int, num_shards: int) -> slice:
    """The ids of a shard's rows, in its own order: see `Placement`."""
    return slice(shard, None, num_shards)


def read_plain(path: Path) -> Whole:
    """A `MemoryBank`'s folder."""
    manifest, lock = open_folder(path)
    try:
        bank, _, _ = read_bank(MemoryBank, path, manifest, storage=RAM, device=None)
    finally:
        if lock is not None:
            os.close(lock)
    whole = Whole(manifest.arguments, manifest.sync)
    if bank.has_product_keys:
        whole.arguments = Arguments(**of_values(manifest.arguments.model_dump()))
        whole.subkeys = bank.keys.data
    whole.enter(bank, every(0, 1))
    bank.close()
    return whole


def begun(path: Path, manifest: Manifest) -> Whole:
    """What a sharded bank holds beside its shards."""
    whole = Whole(Arguments(num_rows=manifest.num_rows, **manifest.arguments), manifest.sync)
    whole.clock = manifest.clock
    whole.subkeys = None if manifest.product_width is None else manifest.subkeys(path)
    return whole


def read_sharded(path: Path) -> Whole:
    """A sharded bank's folder: the version in force, and all that was answered since."""
    with claimed(path, read_manifest(path).num_shards):
        manifest = read_manifest(path)
        whole = begun(path, manifest)
        for shard in range(manifest.num_shards):
            folder, own = folder_of(path, shard), every(shard, manifest.num_shards)
            history = read_history(folder, manifest, shard)
            server = read_server(folder, manifest, shard, history)
            whole.enter(server.bank, own)
            whole.enter_states(server, own)
            server.close()
    return whole


@contextmanager
def claimed(path: Path, num_shards: int) -> Iterator[None]:
    """All shards' folders, for as long as it takes; BankError where somebody has one."""
    locks: list[int] = []
    try:
        for shard in range(num_shards):
            locks.append(claim_shard(path, shard))
        yield
    finally:
        for lock in locks:
            os.close(lock)


def write_sharded(folder: Path, whole: Whole, num_shards: int) -> None:
    """A sharded bank's files, one shard after another."""
    manifest = Manifest(
        bank=uuid.uuid4().hex,
        num_shards=num_shards,
        num_rows=whole.num_rows,
        arguments=whole.given(),
        sync=whole.sync,
        version=FIRST,
        log=FIRST,
        clock=whole.clock,
        product_width=None if whole.subkeys is None else 2 * whole.subkeys.shape[2],
    )
    lay_out(folder, manifest, whole.subkeys)
    for shard in range(num_shards):
        server, own = ShardServer(manifest.new_bank(shard)), every(shard, num_shards)
        whole.fill(server.bank, own)
        whole.fill_states(server, own)
        place = checkpoint_at(folder_of(folder, shard), FIRST)
        place.mkdir()
        server.checkpoint(place)
        server.close()


def plain_bank(whole: Whole) -> MemoryBank:
    """A `MemoryBank` with all of it but the optimisers' states."""
    given = {**whole.given(), "dtype": getattr(torch, whole.arguments.dtype)}
    if whole.subkeys is not None:
        given = of_pairs(given, 2 * whole.subkeys.shape[2])
    bank = MemoryBank(whole.num_rows, **given)
    if whole.subkeys is not None:
        bank.keys.data.copy_(whole.subkeys)
    whole.fill(bank, every(0, 1))
    return bank


def is_sharded(path: Path) -> bool:
    """Whether a folder is a sharded bank's, by its manifest."""
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(found, dict) and found.get("format") == Manifest.model_fields["format"].default
    )


def reshard(path: str | Path, new: str | Path, num_shards: int | None) -> Path:
    """Write a bank into a new folder, which appears whole or not at all; returns its path.

    The old folder stays as it is; nobody may have it open meanwhile. All rows have to fit into
    memory.

    Args:
        path: the folder of a `ShardedBank` or of a `MemoryBank`.
        new: where nothing is yet, or an empty folder.
        num_shards: of the new one; None: a snapshot of a `MemoryBank`. That has no place for the
            state of row optimisers.
    """
    path, new = Path(path), check_new_place(new)
    whole = read_sharded(path) if is_sharded(path) else read_plain(path)
    if num_shards is None:
        bank = plain_bank(whole)
        bank.save(new)
        bank.close()
        return new
    Placement.of(whole.num_rows, num_shards)
    with write_errors(new), new_folder(new) as folder:
        write_sharded(folder, whole, num_shards)
    return new
