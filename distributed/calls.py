"""What shards were asked, written down before it is done: a log of calls.

The framing is that of a bank's journal (docs/bank-format.md): records with checksums, appended
whole; a torn tail is cut off, damage is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.journal import Kind, Log, LogReader, Record
from sparsemem.distributed.wire import pack, unpack

HEAD = "call"  # name of the array that holds the JSON part


class Call(NamedTuple):
    """One call of a shard. `client` and `sequence` number the changes that a client asks for."""

    operation: str
    arguments: tuple[Any, ...]
    client: str = ""
    sequence: int = 0  # 0: it changes nothing that has to last


def to_arrays(value: Any) -> dict[str, Tensor]:
    """A value that `wire` knows, as named arrays."""
    tree, tensors = pack(value)
    head = torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)
    return {HEAD: head} | {str(number): tensor for number, tensor in enumerate(tensors)}


def from_arrays(arrays: dict[str, Tensor]) -> Any:
    """The value. ValueError if it is not one."""
    if HEAD not in arrays:
        raise ValueError(f"expected an array named {HEAD!r}")
    tree = json.loads(bytes(arrays[HEAD].tolist()))
    names = sorted((name for name in arrays if name != HEAD), key=int)
    return unpack(tree, [arrays[name] for name in names])


class Logged(NamedTuple):
    """What a log holds."""

    path: Path
    calls: list[Call]
    first: int  # number of its first record
    sequence: int  # of the record that would come next
    end: int  # bytes of whole records; 0: it was just being begun
    torn: int  # bytes after them, of a call that was not answered


class CallLog:
    """The calls that changed a shard since its last checkpoint.

    Records are numbered through all logs of a shard, so that a missing log is noticed.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    @classmethod
    def create(cls, path: Path, shard: str, sequence: int = 0, *, sync: bool = False) -> CallLog:
        """Begin a log of the shard with this id (hexadecimal), at a record's number."""
        return cls(Log.create(path, shard, sequence, sync))

    @staticmethod
    def read(path: Path, shard: str) -> Logged:
        """What a shard's log holds; the file stays as it is."""
        reader = LogReader(path, {Kind.START, Kind.CALL})
        calls: list[Call] = []
        first = 0
        for record in reader:
            if record.kind is Kind.CALL:
                calls.append(call_of(record, path))
                continue
            first = record.sequence
            if bytes(record.arrays["bank"].tolist()).hex() != shard:
                raise BankError(f"{path} is another shard's log")
        return Logged(path, calls, first, reader.sequence, reader.end, reader.torn)

    @classmethod
    def gone_on(cls, logged: Logged, *, sync: bool = False) -> CallLog:
        """Go on with a log that was read; a torn tail is cut off."""
        return cls(Log(logged.path, logged.end, logged.sequence, sync))

    @classmethod
    def reopen(cls, path: Path, shard: str, *, sync: bool = False) -> tuple[CallLog, list[Call]]:
        """Go on with a shard's log, and the calls that it holds."""
        logged = cls.read(path, shard)
        return cls.gone_on(logged, sync=sync), logged.calls

    @property
    def sequence(self) -> int:
        """Number of the next record."""
        return self._log.sequence

    def append(self, call: Call) -> None:
        """Write a call down. BankError where that fails: then it must not be done."""
        self._log.append(Kind.CALL, to_arrays(tuple(call)))

    def flush(self) -> None:
        """Wait until all calls are on the disk."""
        self._log.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._log.close()


def call_of(record: Record, path: Path) -> Call:
    """The call of a record."""
    try:
        return Call(*from_arrays(record.arrays))
    except (ValueError, TypeError) as error:
        what = f"{path} is damaged: the record at byte {record.offset} is no call"
        raise DamagedError(f"{what}: {error}") from None
