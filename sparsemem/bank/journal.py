"""The journal of a durable bank: every change of its rows, written down before it is made.

A log is a file of records, each written whole by one append. A write that has returned is in
the file, and so survives the process; with `sync` it is on the disk, and survives the machine.
docs/bank-format.md gives the bytes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.files import sync_folder

MAGIC = b"SMBL"
_HEAD = struct.Struct("<4sB3xQQI")  # magic, kind, sequence, bytes of payload, crc32 of payload
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size


class Kind(IntEnum):
    """What a record says; each operation sets fields of rows and is safe to repeat."""

    START = 0  # the log begins
    PUT = 1  # rows are there: `rows` and `values` where given, `tags`, `expiry`
    DROP = 2  # rows are gone
    FLAG = 3  # rows are frozen or not: `frozen`
    NEW = 4  # as PUT, and they are other rows than those that were there
    CALL = 5  # not in a bank's log: what a shard of a sharded bank was asked


BANK_KINDS = frozenset(Kind) - {Kind.CALL}


class Journal(Protocol):
    """What a bank tells of its changes (`bank.journal`; None where nothing is durable)."""

    path: Path

    def record(self, kind: Kind, ids: Int[Tensor, " n"], arrays: Mapping[str, Tensor]) -> None:
        """Write an operation down, under `table.lock.write()` and before it is applied.

        Raises BankError where that fails; then nothing was written and nothing may be applied.
        """

    def expect_change(self) -> None:
        """Be told, under `table.lock.write()`, that tables are about to be changed in place.

        So what somebody else changed before, and did not tell of, is not taken for told.
        """

    def touched(self, ids: Int[Tensor, " n"] | None, table: Tensor | None = None) -> None:
        """Be told, under `table.lock.write()`, of rows changed without a record.

        They become durable at the next `save`. Any order, repeats allowed; O(len(ids)). None: any
        of them. table: the one that was changed in place, by an optimiser's step say; all that
        was changed in it since `expect_change` is told with this.
        """

    def save(self) -> None:
        """Make everything durable that is not, and shorten the log to nothing."""

    def close(self) -> None:
        """Let go of the folder. Whoever changes rows after that gets a BankError."""


class Record(NamedTuple):
    """One record of a log, and where it lies."""

    kind: Kind
    sequence: int
    arrays: dict[str, Tensor]
    offset: int


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        place = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory: keys given as values too, say.
        own[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return safetensors.torch.save(own)


def encode_record(kind: Kind, sequence: int, arrays: Mapping[str, Tensor]) -> bytes:
    """The bytes of a record: a header of 32 bytes, then a safetensors file."""
    payload = encode_tensors(arrays)
    head = _HEAD.pack(MAGIC, kind, sequence, len(payload), zlib.crc32(payload))
    return b"".join((head, _CRC.pack(zlib.crc32(head)), payload))


class Log:
    """A log that is written to: records go to its end, whole or not at all."""

    def __init__(self, path: Path, size: int, sequence: int, sync: bool) -> None:
        """Go on with a log of `size` whole bytes, whose next record has number `sequence`."""
        self.path = path
        self._end = size, sequence  # one assignment: an interrupt changes both or neither
        self._sync = sync
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._trim()

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self._end[0]

    @property
    def sequence(self) -> int:
        """Number of the next record."""
        return self._end[1]

    @classmethod
    def create(cls, path: Path, bank: str, sequence: int, sync: bool) -> Log:
        """Begin a log of the bank with this id; it is on the disk when this returns."""
        path.write_bytes(b"")  # a failed attempt may have left one
        log = cls(path, 0, sequence, sync)
        try:
            log.append(Kind.START, {"bank": torch.tensor(list(bytes.fromhex(bank))).byte()})
            log.flush()
            sync_folder(path.parent)
        except BaseException:
            log.close()
            path.unlink(missing_ok=True)
            raise
        return log

    def append(self, kind: Kind, arrays: Mapping[str, Tensor]) -> None:
        """Write one record. BankError: nothing was written."""
        data = encode_record(kind, self.sequence, arrays)
        try:
            self._trim()
            _write_whole(self._file, data)
            if self._sync:
                os.fsync(self._file)
            self._end = self.size + len(data), self.sequence + 1
        except OSError as error:
            self._take_back()
            raise BankError(
                f"cannot write to {self.path}: {error.strerror or error};"
                " the bank is as it was before this operation"
            ) from error
        except BaseException:  # an interrupt before the record counts
            self._take_back()
            raise

    def flush(self) -> None:
        """Wait until all records, and nothing else, are on the disk."""
        self._trim()
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _trim(self) -> None:
        if os.fstat(self._file).st_size > self.size:
            os.ftruncate(self._file, self.size)

    def _take_back(self) -> None:
        """Cut off a record that failed; if that fails too, the next append tries again first."""
        with suppress(OSError):
            self._trim()


def _write_whole(file: int, data: bytes) -> None:
    """One system call, unless the system takes less than all (2 GB, a signal, a full disk)."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


class LogReader:
    """The records of a log, each checked; iterate once, then look at `end` and `torn`.

    A file that ends inside a record, or goes on with nothing but zeros, has a torn tail: what a
    crash leaves of an operation that never returned. Anything else that is wrong is damage.
    """

    def __init__(self, path: Path, kinds: Collection[Kind] = BANK_KINDS) -> None:
        self.path, self._kinds = path, kinds
        self.end = 0  # where the whole records end
        self.sequence = 0  # of the record that would come next
        self.torn = 0  # bytes of a torn tail

    def __iter__(self) -> Iterator[Record]:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                while self.end < size:
                    head = file.read(HEADER_BYTES)
                    if len(head) < HEADER_BYTES or (not any(head) and _only_zeros(file)):
                        break
                    kind, sequence, length, crc = self._parse(head)
                    if self.end + HEADER_BYTES + length > size:
                        break
                    yield self._decode(kind, sequence, file.read(length), crc)
                self.torn = size - self.end
        except OSError as error:
            raise DamagedError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _parse(self, head: bytes) -> tuple[int, int, int, int]:
        magic, kind, sequence, length, crc = _HEAD.unpack_from(head)
        (own,) = _CRC.unpack_from(head, _HEAD.size)
        if magic != MAGIC or zlib.crc32(head[: _HEAD.size]) != own:
            raise self._damaged("its header does not match its checksum")
        return kind, sequence, length, crc

    def _decode(self, kind: int, sequence: int, payload: bytes, crc: int) -> Record:
        if zlib.crc32(payload) != crc:
            raise self._damaged("its contents do not match their checksum")
        if self.end and sequence != self.sequence:
            raise self._damaged(f"it has number {sequence}, expected {self.sequence}")
        if kind not in self._kinds or (kind == Kind.START) != (self.end == 0):
            raise self._damaged(f"it is of kind {kind}, which does not belong there")
        try:
            arrays = safetensors.torch.load(payload)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise self._damaged(
                f"its contents are not in the safetensors format: {error}"
            ) from None
        record = Record(Kind(kind), sequence, arrays, self.end)
        self.end += HEADER_BYTES + len(payload)
        self.sequence = sequence + 1
        return record

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self.path} is damaged: the record at byte {self.end}: {what}")


def _only_zeros(file: BinaryIO) -> bool:
    """Whether a file has nothing but zeros from here on; leaves it somewhere behind."""
    return not any(any(part) for part in iter(lambda: file.read(1 << 20), b""))
