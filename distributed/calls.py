"""What shards were asked, written down before it is done: a log of calls.

The framing is that of a bank's journal (docs/bank-format.md): records with checksums, appended
whole; a torn tail is cut off, damage is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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


class CallLog:
    """The calls that changed a shard since its last checkpoint."""

    def __init__(self, log: Log) -> None:
        self._log = log

    @classmethod
    def create(cls, path: Path, shard: str, *, sync: bool = False) -> CallLog:
        """Begin a log of the shard with this id (hexadecimal)."""
        return cls(Log.create(path, shard, 0, sync))

    @classmethod
    def reopen(cls, path: Path, shard: str, *, sync: bool = False) -> tuple[CallLog, list[Call]]:
        """Go on with a shard's log, and the calls that it holds; a torn tail is cut off."""
        reader = LogReader(path, {Kind.START, Kind.CALL})
        calls = list(cls._calls(reader, shard))
        if not reader.end:  # it was just being begun
            return cls.create(path, shard, sync=sync), []
        return cls(Log(path, reader.end, reader.sequence, sync)), calls

    @staticmethod
    def _calls(reader: LogReader, shard: str) -> Iterator[Call]:
        for record in reader:
            if record.kind is Kind.CALL:
                yield call_of(record, reader.path)
            elif bytes(record.arrays["bank"].tolist()).hex() != shard:
                raise BankError(f"{reader.path} is another shard's log")

    def append(self, call: Call) -> None:
        """Write a call down. BankError where that fails: then it must not be done."""
        self._log.append(Kind.CALL, to_arrays(tuple(call)))

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
