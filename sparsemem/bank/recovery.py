"""What a bank's folder holds: claimed, read, checked to the last byte, and put together."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.journal import Kind, LogReader, Record
from sparsemem.bank.manifest import Manifest, read_manifest
from sparsemem.bank.shards import (
    TABLES,
    Fields,
    Layout,
    check_ascending,
    check_fields,
    check_numbers,
    column,
    put_live,
    put_rows,
    read_keys,
    read_shard,
)
from sparsemem.bank.store import RowStore

LOCK = "lock"
ATTEMPTS = 10  # to read a folder that somebody writes to
PAUSE = 0.02  # seconds before the second, and so much more before each further one

Bank = TypeVar("Bank", bound=RowStore)


class Tail(NamedTuple):
    """Where a bank's last log ends, and so where the next record goes."""

    number: int  # of the log
    size: int  # bytes, without a torn tail
    sequence: int  # of the next record
    records: int  # operations in all logs
    torn: int  # bytes of a torn tail
    all_bytes: int  # of all logs, with a torn tail


def log_path(folder: Path, number: int) -> Path:
    """Where a log lies."""
    return folder / f"log-{number:08d}"


def claim(path: Path) -> int:
    """Lock a durable bank's folder for this process; returns the file that holds the lock.

    The system lets go of it when the process ends, however it does.
    """
    file = path / LOCK
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise BankError(f"cannot open {file}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise BankError(
                f"{path} is in use: another bank, in this process or another, has it open"
            ) from None
        raise BankError(f"cannot lock {file}: {error.strerror}") from error
    return lock


def open_folder(path: Path) -> tuple[Manifest, int | None]:
    """The manifest of a bank's folder, and its lock if the bank is durable."""
    manifest = read_manifest(path)
    if not manifest.durable:
        return manifest, None
    lock = claim(path)
    try:
        return read_manifest(path), lock  # another process may have saved until now
    except BaseException:
        os.close(lock)
        raise


def read_bank(
    kind: type[Bank],
    path: Path,
    manifest: Manifest,
    *,
    storage: str | Path,
    device: torch.device | str | None,
) -> tuple[Bank, Tail | None, Tensor]:
    """A bank with the contents of a folder, not attached to it; any damage is refused.

    Returns with it the end of its logs (None: a snapshot) and the ids that the logs changed.
    """
    layout = Layout.of(manifest.arguments)
    check_sizes(path, manifest)
    bank = _empty(kind, manifest, storage, device)
    book = bank.book
    with torch.no_grad():
        for shard in manifest.rows:
            put_live(bank, shard, read_shard(path, shard, layout, layout.rows))
        for shard in manifest.usage:
            put_rows(bank, read_shard(path, shard, layout, layout.usage))
        if manifest.keys is not None:
            column(bank, "keys").copy_(read_keys(path, manifest.keys, layout)["keys"])
        book.clock.fill_(manifest.clock)
        book.batches.fill_(manifest.batches)
        changed = [torch.empty(0, dtype=torch.int64)]

        def apply(record: Record, place: str) -> None:
            check_operation(record, layout, place)
            replay(bank, record)
            changed.append(record.arrays["ids"])

        tail = read_logs(path, manifest, apply, _warn_torn) if manifest.durable else None
        bank.rebind()
    return bank, tail, torch.cat(changed)


class Summary(NamedTuple):
    """What a folder holds."""

    manifest: Manifest
    operations: int  # in its logs
    log_bytes: int


def inspect_folder(path: Path) -> Summary:
    """What a folder holds, by its manifest and logs; rows are not read. Needs no lock.

    A bank that is open elsewhere may log and save meanwhile: what looks like damage, or a torn
    tail, is looked at again until the files have stayed as they were. BankError where they never
    do.
    """
    for attempt in range(ATTEMPTS):
        time.sleep(attempt * PAUSE)
        before = _files_of(path)
        torn: list[LogReader] = []
        try:
            summary = _summary(path, read_manifest(path), lambda record, place: None, torn.append)
        except DamagedError:
            if _files_of(path) == before:
                raise
        else:
            if not torn or _files_of(path) == before:
                for reader in torn:
                    _warn_torn(reader)
                return summary
    raise BankError(
        f"{path} changed while it was read, {ATTEMPTS} times: another process writes to it."
        " Expected a moment of rest, or that the bank is closed"
    )


def _files_of(path: Path) -> set[tuple[str, int, int, int]]:
    """What tells that a process has written to a folder; nothing where it cannot be read."""
    found = set()
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # it went meanwhile
                status = entry.stat()
                found.add((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def verify_folder(path: Path) -> Summary:
    """Check every byte of a folder, without building the bank; BankError names what is wrong."""
    manifest, lock = open_folder(path)
    try:
        layout = Layout.of(manifest.arguments)
        check_sizes(path, manifest)
        for shard in manifest.rows:
            read_shard(path, shard, layout, layout.rows)
        for shard in manifest.usage:
            read_shard(path, shard, layout, layout.usage)
        if manifest.keys is not None:
            read_keys(path, manifest.keys, layout)
        return _summary(
            path,
            manifest,
            lambda record, place: check_operation(record, layout, place),
            _warn_torn,
        )
    finally:
        if lock is not None:
            os.close(lock)


def _summary(
    path: Path,
    manifest: Manifest,
    apply: Callable[[Record, str], None],
    torn: Callable[[LogReader], None],
) -> Summary:
    if not manifest.durable:
        return Summary(manifest, 0, 0)
    tail = read_logs(path, manifest, apply, torn)
    return Summary(manifest, tail.records, tail.all_bytes)


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Refuse a folder with files missing or of another size: cheap, before anything is read."""
    for file in manifest.files:
        try:
            size = (path / file.file).stat().st_size
        except OSError as error:
            raise DamagedError(f"cannot read {path / file.file}: {error.strerror}") from None
        if size != file.bytes:
            raise DamagedError(f"{path / file.file} is torn: {size} bytes, expected {file.bytes}")


def read_logs(
    path: Path,
    manifest: Manifest,
    apply: Callable[[Record, str], None],
    torn: Callable[[LogReader], None],
) -> Tail:
    """Hand each operation of a bank's logs, in order, to `apply`, with the name of its place.

    A log with a torn tail is handed to `torn`; the tail is left out, as is a last log that a save
    began and gave up.
    """
    last: Tail | None = None
    sequence, length = manifest.sequence, 0
    for number in itertools.count(manifest.save):
        file = log_path(path, number)
        if last is not None and (not file.exists() or _was_given_up(file, manifest, last)):
            _check_last(path, number)
            break
        reader, records = LogReader(file), 0 if last is None else last.records
        for record in reader:
            place = f"{file}: the record at byte {record.offset}"
            if record.kind is Kind.START:
                _check_start(record, manifest, sequence, place)
            else:
                apply(record, place)
                records += 1
        if reader.torn:
            torn(reader)
        if not reader.end and last is not None:
            _check_last(path, number)
            break  # it was never begun: a save was stopped before anything else
        if not reader.end or (last is not None and last.torn):
            raise DamagedError(f"{file} is torn: it does not go on from what was logged before it")
        sequence = reader.sequence
        length += reader.end + reader.torn
        last = Tail(number, reader.end, sequence, records, reader.torn, length)
    assert last is not None
    return last


def _was_given_up(file: Path, manifest: Manifest, last: Tail) -> bool:
    """Whether a log was begun by a save that failed, and could not be removed.

    The log before it was gone on with, up to where `last` says. This one holds no operation.
    """
    reader = LogReader(file)
    records = list(itertools.islice(reader, 2))
    if len(records) != 1 or reader.torn:
        return False
    _check_bank(records[0], manifest, f"{file}: the record at byte 0")
    begun = records[0].sequence
    return begun < last.sequence or (begun == last.sequence and last.torn > 0)


def _check_last(path: Path, number: int) -> None:
    """Refuse a folder with logs of greater numbers than one that is missing or never begun."""
    later = [file for file in path.glob("log-*") if file.name[4:].isdecimal()]
    if any(int(file.name[4:]) > number for file in later):
        missing = log_path(path, number)
        raise DamagedError(
            f"cannot read {missing}: it is missing or was never begun, and later logs are there"
        )


def check_operation(record: Record, layout: Layout, place: str) -> None:
    """Refuse a record whose arrays are not those of an operation on such a bank."""
    arrays = dict(record.arrays)
    clock, ids = arrays.pop("clock", None), arrays.get("ids")
    if clock is None or clock.dtype != torch.int64 or clock.ndim:
        raise BankError(f"{place}: expected `clock`, one int64")
    if ids is None or ids.ndim != 1:
        raise BankError(f"{place}: expected `ids`, int64 [n]")
    check_fields(arrays, _fields(record, layout), len(ids), place)
    check_ascending(ids.sort().values, 0, layout.num_rows, place)
    check_numbers(arrays, place)


def _fields(record: Record, layout: Layout) -> Fields:
    """What an operation says of each row."""
    wanted = {
        Kind.DROP: set[str](),
        Kind.FLAG: {"frozen"},
    }.get(record.kind, {"tags", "expiry", *(record.arrays.keys() & set(TABLES))})
    return {name: field for name, field in layout.rows.items() if name in wanted}


def replay(bank: RowStore, record: Record) -> None:
    """Apply a checked operation to the tables and the book alone, as `RowStore` does."""
    arrays = {name: array.to(bank.keys.device) for name, array in record.arrays.items()}
    ids, book = arrays["ids"], bank.book
    book.clock.fill_(max(book.now, int(arrays["clock"])))
    if record.kind is Kind.FLAG:
        book.flag(ids, arrays["frozen"])
        return
    if record.kind is Kind.DROP:
        book.live.index_fill_(0, ids, False)
    if record.kind is not Kind.PUT:
        book.clear(ids)
    if record.kind is Kind.DROP:
        return
    given = [name for name in TABLES if name in arrays]
    for name in given:
        column(bank, name).index_copy_(0, ids, arrays[name])
    book.live.index_fill_(0, ids, True)
    book.enter(ids, arrays["tags"], arrays["expiry"])
    if given:
        book.written.index_fill_(0, ids, book.now)
        book.accessed(ids)


def _empty(
    kind: type[Bank], manifest: Manifest, storage: str | Path, device: torch.device | str | None
) -> Bank:
    arguments = manifest.arguments.model_dump()
    arguments["dtype"] = getattr(torch, arguments["dtype"])
    try:
        return kind(**arguments, storage=storage, device=device)
    except (TypeError, ValueError) as error:
        raise BankError(f"the bank cannot be made as its manifest has it: {error}") from error


def _check_bank(record: Record, manifest: Manifest, place: str) -> None:
    bank = record.arrays.get("bank")
    if bank is None or bytes(bank.tolist()).hex() != manifest.bank:
        raise BankError(f"{place}: the log is another bank's")


def _check_start(record: Record, manifest: Manifest, sequence: int, place: str) -> None:
    _check_bank(record, manifest, place)
    if record.sequence != sequence:
        raise DamagedError(f"{place}: it has number {record.sequence}, expected {sequence}")


def _warn_torn(reader: LogReader) -> None:
    warnings.warn(
        f"{reader.path} has a torn tail: the {reader.torn} bytes from byte {reader.end} on, of an"
        " operation that was not finished, are left out",
        stacklevel=2,
    )
