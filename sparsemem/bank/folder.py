"""Banks in folders: snapshots, and durable banks that survive a crash at any moment.

What is on the disk is the manifest, the shards that it names, and the logs from the one that it
names on. A save writes shards beside the old ones and then replaces the manifest, so that at every
moment a manifest, its shards and its logs give all that was acknowledged.
docs/bank-format.md gives the bytes.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparsemem.bank.errors import BankError, write_errors
from sparsemem.bank.journal import Kind, Log
from sparsemem.bank.manifest import MANIFEST, Arguments, Manifest, encode_manifest, read_manifest
from sparsemem.bank.recovery import Bank, Tail, claim, log_path, open_folder, read_bank
from sparsemem.bank.saving import start_manifest, write_files, write_new
from sparsemem.bank.shards import SHARD_ROWS, Layout
from sparsemem.bank.store import RowStore
from sparsemem.bank.tables import RAM
from sparsemem.files import new_folder, replace_file

_OURS = re.compile(r"(rows|usage|keys)-[0-9-]+\.safetensors|log-\d+|\.manifest\.json\.part")


def check_new_place(path: str | Path) -> Path:
    """The absolute path of a place where nothing is, or an empty folder; else BankError."""
    path = _absolute(path)
    if (path / MANIFEST).exists():
        raise BankError(f"{path} holds a bank already: MemoryBank.load(path) opens it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BankError(f"{path} is there already, expected a new or an empty folder")
    return path


def save_bank(bank: RowStore, path: str | Path | None) -> None:
    """Make all of a durable bank durable, or write a snapshot of any bank into a new folder.

    See `BankFolder.save` (no path, or the bank's own) and `save_snapshot`.
    """
    journal = bank.journal
    if journal is not None and (path is None or _absolute(path) == journal.path):
        journal.save()
    elif path is None:
        raise ValueError("path is None, expected a new folder: this bank is not durable")
    else:
        save_snapshot(bank, path)


def save_snapshot(bank: RowStore, path: str | Path) -> None:
    """Write a bank into a new folder, which appears whole or not at all.

    Writers wait meanwhile. BankError where `path` is there already (it may be an empty folder), or
    cannot be written, or rows hold NaN or infinity.
    """
    path = check_new_place(path)
    with bank.table.lock.read(), write_errors(path), new_folder(path) as folder:
        write_new(bank, folder, start_manifest(bank, durable=False, sync=False))


def create_folder(bank: RowStore, path: str | Path, sync: bool = False) -> BankFolder:
    """Make a bank durable in a new folder; returns what is to be its journal.

    sync: wait at each operation until it is on the disk. BankError as for `save_snapshot`.
    """
    path = check_new_place(path)
    with bank.table.lock.read(), write_errors(path):
        with new_folder(path) as folder:
            start = start_manifest(bank, durable=True, sync=sync)
            log = Log.create(log_path(folder, 0), start.bank, 0, sync)
            log.close()
            manifest = write_new(bank, folder, start)
        tail = Tail(0, log.size, log.sequence, records=0, torn=0, all_bytes=log.size)
        return BankFolder(bank, path, claim(path), manifest, tail)


def load_bank(
    kind: type[Bank],
    path: str | Path,
    *,
    storage: str | Path = RAM,
    device: torch.device | str | None = None,
) -> Bank:
    """The bank of a folder. A durable bank goes on in its folder; a snapshot is left alone.

    Everything is checked: BankError says which file is wrong, and where. A torn tail of the log,
    which is what a crash leaves of an operation that had not returned, is cut off with a warning.
    """
    path = _absolute(path)
    manifest, lock = open_folder(path)
    try:
        bank, tail, changed = read_bank(kind, path, manifest, storage=storage, device=device)
        if lock is not None and tail is not None:
            with write_errors(path):
                bank.journal = folder = BankFolder(bank, path, lock, manifest, tail)
            folder.touched(changed)
            folder.tidy()
    except BaseException:
        if lock is not None:
            with suppress(OSError):
                os.close(lock)
        raise
    return bank


class BankFolder:
    """The folder of an open durable bank: its `Journal`."""

    def __init__(
        self, bank: RowStore, path: Path, lock: int, manifest: Manifest, tail: Tail
    ) -> None:
        """Go on with a claimed folder, whose contents are in `bank`."""
        self.path = path
        self._bank = weakref.ref(bank)
        self._manifest = manifest
        self._number = tail.number
        self._log = Log(log_path(path, tail.number), tail.size, tail.sequence, manifest.sync)
        self._process = os.getpid()
        self._lock = lock  # from here on it is this object's to let go of
        self._saving = threading.Lock()
        self._changed = torch.zeros(Layout.of(manifest.arguments).num_shards, dtype=torch.bool)
        self._states = [_state(table) for table in bank.tables]

    def record(self, kind: Kind, ids: Int[Tensor, " n"], arrays: Mapping[str, Tensor]) -> None:
        """See `Journal.record`."""
        bank = self._open()
        _check_dtype(bank, self._manifest.arguments)
        named = {"keys" if name == "rows" else name: array for name, array in arrays.items()}
        self.touched(ids)
        self._log.append(kind, {"ids": ids, "clock": bank.book.clock, **named})

    def expect_change(self) -> None:
        """See `Journal.expect_change`."""
        if (bank := self._bank()) is not None:
            self._notice(bank)

    def touched(self, ids: Int[Tensor, " n"] | None, table: Tensor | None = None) -> None:
        """See `Journal.touched`."""
        shards = slice(None) if ids is None else (ids // SHARD_ROWS).to(self._changed.device)
        self._changed[shards] = True
        bank = self._bank()
        if table is None or bank is None:
            return
        for place, own in enumerate(bank.tables):
            if own is table:
                self._states[place] = _state(table)

    def save(self) -> None:
        """Begin a new log, write the shards that changed, replace the manifest.

        Reads and writes go on meanwhile, but for the moments in which a shard is copied: what they
        change is in the new log, whose records are safe to repeat on shards that have them
        already. BankError: nothing was saved, and all that was durable still is.
        """
        bank = self._open()
        with self._saving, write_errors(self.path):
            with bank.table.lock.read():  # no writer between the logs
                start = self._begin_log(bank)
                self._notice(bank)
                changed = self._changed.clone()
            try:
                self._changed ^= changed  # marks that come from here on are the next save's
                usage = changed | self._used(bank)
                manifest = write_files(bank, self.path, start, self._manifest, changed, usage)
                replace_file(self.path / MANIFEST, encode_manifest(manifest))
            except BaseException:
                self._changed |= changed
                self._give_up()
                raise
            self._manifest = manifest
            self.tidy()

    def close(self) -> None:
        """See `Journal.close`."""
        self._log.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def tidy(self) -> None:
        """Remove what belongs to the folder no more: leftovers cost room and nothing else."""
        logs = range(self._manifest.save, self._number + 1)
        current = {file.file for file in self._manifest.files}
        current |= {log_path(self.path, number).name for number in logs}
        with suppress(OSError):
            for file in self.path.iterdir():
                if _OURS.fullmatch(file.name) and file.name not in current:
                    file.unlink()

    def _open(self) -> RowStore:
        bank = self._bank()
        if bank is None or self._lock < 0:
            raise BankError(f"{self.path} was closed: MemoryBank.load opens it again")
        if self._process != os.getpid():  # a forked child shares the lock and the log's file
            raise BankError(
                f"{self.path} belongs to process {self._process}, which opened it: expected no"
                f" change from process {os.getpid()}"
            )
        return bank

    def _begin_log(self, bank: RowStore) -> Manifest:
        """Go on in a new log; returns the manifest that it follows, without files."""
        self._log.flush()  # a log that another follows must not have a torn tail
        old = self._manifest
        number, sequence = self._number + 1, self._log.sequence
        log = Log.create(log_path(self.path, number), old.bank, sequence, old.sync)
        self._log.close()
        self._log, self._number = log, number
        start = start_manifest(bank, durable=True, sync=old.sync)
        return start.model_copy(update={"bank": old.bank, "save": number, "sequence": sequence})

    def _notice(self, bank: RowStore) -> None:
        """Mark all shards if a table is not as it was when somebody last told of a change."""
        states = [_state(table) for table in bank.tables]
        if states != self._states:
            self.touched(None)
            self._states = states

    def _used(self, bank: RowStore) -> Bool[Tensor, " S"]:
        """Marks of the shards whose usage changed since the last save."""
        marks = torch.zeros_like(self._changed)
        if int(bank.book.batches) != self._manifest.batches:
            return ~marks
        for number in range(-(-bank.table.extent // SHARD_ROWS)):
            times = bank.book.last_access[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
            marks[number] = (times >= self._manifest.clock).any()
        return marks

    def _give_up(self) -> None:
        """Remove the files of a save that failed, unless the new manifest is in place after all."""
        with suppress(BankError):
            if read_manifest(self.path) == self._manifest:
                self.tidy()


def _check_dtype(bank: RowStore, arguments: Arguments) -> None:
    """Refuse to log rows of another dtype than that of the shards that the log follows."""
    dtype = bank.arguments["dtype"]
    if dtype != arguments.dtype:
        raise BankError(
            f"the bank became {dtype} and was last saved as {arguments.dtype}:"
            " expected a save before rows are written"
        )


def _state(table: Tensor) -> tuple[Any, ...]:
    """What tells that a table was changed in place or replaced."""
    return table._version, table.dtype, table.data_ptr()


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()
