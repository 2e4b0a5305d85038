"""ShardHome: the folder that a shard comes back from.

    PATH/manifest.json                what is in force, and what the sharded bank is
    PATH/subkeys-7.safetensors        sub-keys at version 7, where there are product keys
    PATH/shard-00001/lock             held by the process that has the shard
    PATH/shard-00001/checkpoint-7/    the shard at version 7 (none at version 0: it was empty)
    PATH/shard-00001/calls-7          what it was asked after that

Checkpoints are numbered, and no number is used by two attempts. All shards make theirs, each
going on with a log of that number; the version is in force once the manifest says so, and until
then every shard keeps what leads there from the version before. So a shard that comes back takes
the manifest's version, and all calls since, however far a checkpoint had got that was under way.
Going back to a version is one change of the manifest too: it names the first log that counts.
Versions that are kept are checkpoints alone: their logs are gone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from sparsemem.bank.errors import BankError, DamagedError, write_errors
from sparsemem.bank.recovery import claim
from sparsemem.distributed.calls import Call, CallLog, Logged
from sparsemem.distributed.placement import Placement
from sparsemem.distributed.server import BANK, ShardServer
from sparsemem.distributed.shard import ShardBank
from sparsemem.distributed.subkeys import new_subkeys, read_subkeys, write_subkeys
from sparsemem.files import new_folder, replace_file, write_synced
from sparsemem.indexes.factory import PRODUCT_KEY

MANIFEST = "manifest.json"
# Of a home, beside a server's.
OPERATIONS = ("checkpoint", "forget", "restore", "standing", "process", "close")
PAUSE = 0.1  # seconds between two looks at a lock


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What a sharded bank's folder holds."""

    format: Literal["sparsemem sharded bank"] = "sparsemem sharded bank"
    format_version: Literal[1] = 1
    bank: str  # an id, which the shards' logs carry too
    num_shards: PositiveInt
    num_rows: PositiveInt
    arguments: dict[str, Any]  # of each shard's bank, beside its number of rows
    sync: bool = False  # each change is waited for until it is on the disk
    version: NonNegativeInt = 0  # the checkpoint in force
    log: NonNegativeInt = 0  # the first log that counts: `version`, or after a `restore` more
    clock: NonNegativeInt = 0  # the callers' when the version was made
    kept: dict[NonNegativeInt, NonNegativeInt] = {}  # other versions, with the clock of each
    product_width: PositiveInt | None = None  # W of product keys; the shards' rows are the values

    @property
    def clocks(self) -> dict[int, int]:
        """All versions that there are, with the callers' clock of each."""
        return {**self.kept, self.version: self.clock}

    def at(self, version: int | None) -> Manifest:
        """With another version in force, and this one kept; None: as it is. Logs are those it has.

        ValueError for a version that there is not.
        """
        if version is None:
            return self
        clock = self.clock_of(version, "version is")
        kept = {number: time for number, time in self.clocks.items() if number != version}
        return self.model_copy(update={"version": version, "clock": clock, "kept": kept})

    def clock_of(self, version: int, what: str) -> int:
        """The callers' clock at a version. ValueError, which begins with `what`, if it is gone."""
        if version not in self.clocks:
            there = ", ".join(map(str, sorted(self.clocks)))
            raise ValueError(f"{what} {version}, expected a version that is there: {there}")
        return self.clocks[version]

    @property
    def placement(self) -> Placement:
        """Which shard owns what."""
        return Placement.of(self.num_rows, self.num_shards)

    @property
    def index(self) -> str:
        """How rows are found."""
        return self.arguments["index"] if self.product_width is None else PRODUCT_KEY

    @property
    def dtype(self) -> torch.dtype:
        """Of the tables."""
        return getattr(torch, self.arguments["dtype"])  # type: ignore[no-any-return]

    def new_bank(self, shard: int, num_rows: int | None = None) -> ShardBank:
        """An empty bank for a shard (or one like it, of other size)."""
        given = {**self.arguments, "dtype": self.dtype}
        initial, _ = given.pop("initial", "empty"), given.pop("seed", 0)
        bank = ShardBank(num_rows or self.placement.rows_of(shard), **given)
        if num_rows is None and (initial == "normal" or self.product_width is not None):
            generator = self.drawn()[1] if initial == "normal" else None
            bank.fill_share(shard, self.num_shards, self.num_rows, generator)
        return bank

    def drawn(self) -> tuple[Tensor | None, torch.Generator]:
        """The sub-keys at the start, if there are any; and the numbers after them."""
        generator = torch.Generator().manual_seed(self.arguments.get("seed", 0))
        if self.product_width is None:
            return None, generator
        return new_subkeys(self.num_rows, self.product_width, self.dtype, generator), generator

    def subkeys(self, path: Path) -> Tensor:
        """Those of the version in force, from the bank's folder."""
        assert self.product_width is not None
        return read_subkeys(path, self.version, self.num_rows, self.product_width, self.dtype)

    def log_id(self, shard: int) -> str:
        """The id of a shard's logs: a log in the wrong place is not taken for its own."""
        return hashlib.blake2b(f"{self.bank} {shard}".encode(), digest_size=16).hexdigest()

    def begin_log(self, folder: Path, shard: int, number: int, sequence: int = 0) -> CallLog:
        """A new log in a shard's folder."""
        place = calls_at(folder, number)
        return CallLog.create(place, self.log_id(shard), sequence, sync=self.sync)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a sharded bank's folder; BankError where there is none, or another's."""
    file = path / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BankError(f"cannot read {file}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise DamagedError(f"{file} is not a sharded bank's: {where}: {first['msg']}") from error


def encode_manifest(manifest: Manifest) -> bytes:
    """Its bytes."""
    return manifest.model_dump_json(indent=1).encode()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put a version in force."""
    with write_errors(path):
        replace_file(path / MANIFEST, encode_manifest(manifest))


def lay_out(path: Path, manifest: Manifest, subkeys: Tensor | None) -> None:
    """The files of a sharded bank, at the manifest's version, in a folder; but for checkpoints."""
    for shard in range(manifest.num_shards):
        folder = folder_of(path, shard)
        folder.mkdir(exist_ok=True)
        manifest.begin_log(folder, shard, manifest.log).close()
    if subkeys is not None:
        write_subkeys(path, manifest.version, subkeys)
    write_synced(path / MANIFEST, encode_manifest(manifest))


def folder_of(path: Path, shard: int) -> Path:
    """Where a shard lies in a sharded bank's folder."""
    return path / f"shard-{shard:05d}"


def calls_at(folder: Path, number: int) -> Path:
    """A log in a shard's folder."""
    return folder / f"calls-{number}"


def checkpoint_at(folder: Path, version: int) -> Path:
    """A checkpoint in a shard's folder."""
    return folder / f"checkpoint-{version}"


def numbered(folder: Path, name: str) -> list[int]:
    """The numbers of what is in a shard's folder under a name, ascending."""
    parts = (entry.name.partition("-") for entry in folder.iterdir())
    return sorted(int(number) for kind, _, number in parts if kind == name and number.isdecimal())


class History(NamedTuple):
    """What a shard was asked since the version in force."""

    number: int  # of its last log
    calls: list[Call]
    last: Logged | None  # that log; None: it has to be begun
    sequence: int  # of the next record


def read_history(folder: Path, manifest: Manifest, shard: int) -> History:
    """The logs that count, each going on where the one before it ends; DamagedError if not so."""
    numbers = [n for n in numbered(folder, "calls") if n >= manifest.log]
    if numbers[:1] != [manifest.log]:
        # A shard may have been killed before it heard that the bank went back to a version.
        if numbers or manifest.log == manifest.version:
            raise DamagedError(f"cannot read {calls_at(folder, manifest.log)}: it is missing")
        return History(manifest.log, [], None, 0)
    calls: list[Call] = []
    logged: Logged | None = None
    sequence = 0
    for number in numbers:
        file = calls_at(folder, number)
        if logged is not None and (logged.torn or not logged.end):
            raise DamagedError(f"{logged.path} is torn, and {file.name} goes on after it")
        logged = CallLog.read(file, manifest.log_id(shard))
        if not logged.end:
            continue  # it was just being begun: the last one, or the next turn refuses it
        if number > manifest.log and logged.first != sequence:
            raise DamagedError(f"{file} begins with {logged.first}, expected {sequence}")
        sequence = logged.sequence
        calls += logged.calls
    assert logged is not None
    if not logged.end and len(numbers) == 1 and manifest.log == manifest.version:
        raise DamagedError(f"{logged.path} is torn: it holds nothing")
    return History(numbers[-1], calls, logged if logged.end else None, sequence)


def read_server(folder: Path, manifest: Manifest, shard: int, history: History) -> ShardServer:
    """The shard as its folder has it, which is left as it is."""
    if manifest.version:
        place = checkpoint_at(folder, manifest.version)
        gone_back = manifest.log > manifest.version
        return ShardServer.restored(place, None, history.calls, gone_back=gone_back)
    return ShardServer.replayed(manifest.new_bank(shard), None, history.calls)


def read_checkpoint(path: Path, manifest: Manifest, shard: int) -> ShardBank:
    """A shard's bank as it was at the manifest's version."""
    if not manifest.version:
        return manifest.new_bank(shard)
    return ShardBank.load(checkpoint_at(folder_of(path, shard), manifest.version) / BANK)


def claim_shard(path: Path, shard: int, patience: float = 0.0) -> int:
    """The lock of a shard's folder, waited for some seconds: see `sparsemem.bank.recovery.claim`.

    A process that was just killed may take a while to go.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return claim(folder_of(path, shard))
        except BankError as error:
            if "is in use" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(PAUSE)


class ShardHome:
    """One shard, at home in its folder. Opening it brings back all that it has answered.

    Args:
        path: the sharded bank's folder, with its manifest.
        shard: the shard's number.
        patience: seconds to wait for a process that has the folder still. BankError after that.
    """

    version: int  # of the log that is written to
    server: ShardServer
    _is_open = False
    _as_saved: int | None = None  # the version that it is at, until it is asked for anything

    def __init__(self, path: Path, shard: int, patience: float = 0.0) -> None:
        manifest = read_manifest(path)
        if not 0 <= shard < manifest.num_shards:
            raise ValueError(f"shard is {shard}, expected 0 .. {manifest.num_shards - 1}")
        self.path, self.shard, self.folder = path, shard, folder_of(path, shard)
        self._lock = claim_shard(path, shard, patience)
        try:
            self._open()
        except BaseException:
            self._unlock()
            raise

    def call(self, call: Call) -> Any:
        """What the shard does with a call; `OPERATIONS` are of the home."""
        if self._lock < 0:
            raise BankError(f"shard {self.shard} is closed")
        if not self._is_open:
            self._open()
        if call.operation in OPERATIONS:
            return getattr(self, call.operation)(*call.arguments)
        self._as_saved = None
        return self.server.call(call)

    def standing(self) -> tuple[int, int]:
        """The greatest number used by a checkpoint or a log; and the clock."""
        return self.version, self.server.bank.book.now

    def process(self) -> int:
        """The process that has the shard."""
        return os.getpid()

    def checkpoint(self, version: int) -> None:
        """Write the shard down as it is now, for a version that is to be. May be repeated."""
        if version == self.version:
            return  # done before: the answer was lost
        if version < self.version:
            raise BankError(f"version is {version}, expected more than {self.version}, the last")
        place = checkpoint_at(self.folder, version)
        manifest = read_manifest(self.path)
        with write_errors(place):
            shutil.rmtree(place, ignore_errors=True)  # of an attempt that was cut short
            with new_folder(place) as folder:
                self.server.checkpoint(folder)
            self.server.change_log(
                lambda sequence: manifest.begin_log(self.folder, self.shard, version, sequence)
            )
        self.version = version

    def forget(self) -> None:
        """Remove what the manifest does not need any more."""
        manifest = read_manifest(self.path)
        for number in numbered(self.folder, "calls"):
            if number < manifest.log:
                calls_at(self.folder, number).unlink(missing_ok=True)
        for number in numbered(self.folder, "checkpoint"):
            if number < manifest.log and number not in manifest.clocks:
                shutil.rmtree(checkpoint_at(self.folder, number), ignore_errors=True)

    def restore(self) -> None:
        """Go to where the manifest says, if its logs are later ones: it was changed for that."""
        manifest = read_manifest(self.path)
        if manifest.log <= self.version:
            return
        if self._as_saved != manifest.version:
            self._let_go()
            self._open()
            return
        with write_errors(self.folder):
            self.server.change_log(
                lambda _: manifest.begin_log(self.folder, self.shard, manifest.log)
            )
        self.server.begin_anew()
        self.version = manifest.log
        self.forget()

    def close(self) -> None:
        """Let go of the folder."""
        self._let_go()
        self._unlock()

    def _open(self) -> None:
        """The version in force, and all calls since."""
        manifest = read_manifest(self.path)
        history = read_history(self.folder, manifest, self.shard)
        self.version, last = history.number, history.last
        self._as_saved = None if history.calls else manifest.version
        with write_errors(self.folder):
            self.server = read_server(self.folder, manifest, self.shard, history)
            if last is not None:
                log = CallLog.gone_on(last, sync=manifest.sync)
            else:
                begun = (self.shard, self.version, history.sequence)
                log = manifest.begin_log(self.folder, *begun)
            self.server.change_log(lambda _: log)
            self.forget()
        self._is_open = True

    def _let_go(self) -> None:
        self._is_open = False
        self.server.close()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1
