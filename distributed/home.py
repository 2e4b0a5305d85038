"""ShardHome: the folder that a shard comes back from.

    PATH/manifest.json                the version in force, and what the sharded bank is
    PATH/shard-00001/checkpoint-7/    the shard at version 7 (none at version 0: it was empty)
    PATH/shard-00001/calls-7          what it was asked after that

A version is made by all shards, one after the other's call or at once, and is in force once the
manifest says so; until then every shard keeps what leads there from the version before. So a
shard that comes back takes the manifest's version, and the calls since, whatever a checkpoint
that was under way had got to.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from sparsemem.bank.errors import BankError, DamagedError, write_errors
from sparsemem.distributed.calls import Call, CallLog
from sparsemem.distributed.placement import Placement
from sparsemem.distributed.server import ShardServer
from sparsemem.distributed.shard import ShardBank
from sparsemem.files import new_folder, replace_file

MANIFEST = "manifest.json"


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What a sharded bank's folder holds."""

    format: Literal["sparsemem sharded bank"] = "sparsemem sharded bank"
    format_version: Literal[1] = 1
    bank: str  # an id, which the shards' logs carry too
    num_shards: PositiveInt
    num_rows: PositiveInt
    arguments: dict[str, Any]  # of each shard's bank, beside its number of rows
    version: NonNegativeInt = 0  # the checkpoint in force
    clock: NonNegativeInt = 0  # the callers' at that moment

    @property
    def placement(self) -> Placement:
        """Which shard owns what."""
        return Placement.of(self.num_rows, self.num_shards)

    def new_bank(self, shard: int, num_rows: int | None = None) -> ShardBank:
        """An empty bank for a shard (or one like it, of other size)."""
        given = dict(self.arguments)
        given["dtype"] = getattr(torch, given["dtype"])
        return ShardBank(num_rows or self.placement.rows_of(shard), **given)

    def log_id(self, shard: int) -> str:
        """The id of a shard's logs: a log in the wrong place is not taken for its own."""
        return hashlib.blake2b(f"{self.bank} {shard}".encode(), digest_size=16).hexdigest()


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


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put a version in force."""
    with write_errors(path):
        replace_file(path / MANIFEST, manifest.model_dump_json(indent=1).encode())


class ShardHome:
    """One shard, at home in its folder. Opening it brings back all that it has answered.

    Args:
        path: the sharded bank's folder, with its manifest.
        shard: the shard's number.
    """

    def __init__(self, path: Path, shard: int) -> None:
        manifest = read_manifest(path)
        if not 0 <= shard < manifest.num_shards:
            raise ValueError(f"shard is {shard}, expected 0 .. {manifest.num_shards - 1}")
        self.path, self.shard = path, shard
        self.folder = path / f"shard-{shard:05d}"
        with write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.version = manifest.version  # of the log that is written to
        self.server = self._opened(manifest)

    def call(self, call: Call) -> Any:
        """What the shard does with a call; and `checkpoint`, `forget` and `restore` of the home."""
        if call.operation in ("checkpoint", "forget", "restore"):
            return getattr(self, call.operation)(*call.arguments)
        return self.server.call(call)

    def checkpoint(self, version: int) -> None:
        """Write the shard down as it is now, for a version that is to be. May be repeated."""
        if version == self.version:
            return  # done before: the answer was lost
        if version < self.version:
            raise BankError(f"version is {version}, expected more than {self.version}, the last")
        place = self._checkpoint(version)
        with write_errors(place):
            shutil.rmtree(place, ignore_errors=True)  # of an attempt that was cut short
            with new_folder(place) as folder:
                self.server.checkpoint(folder)
            log = self._new_log(version)
        self.server.change_log(log)
        self.version = version

    def forget(self, version: int) -> None:
        """What is before a version that is in force is no longer needed."""
        for old in self.folder.iterdir():
            name, _, number = old.name.partition("-")
            if name in ("checkpoint", "calls") and number.isdecimal() and int(number) < version:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def restore(self, version: int) -> None:
        """Go back to a version that is in force: what was asked since is as if it never was."""
        manifest = read_manifest(self.path)
        if version != manifest.version:
            raise BankError(f"version is {version}, expected {manifest.version}, which is in force")
        self.server.close()
        for later in itertools.count(version):
            if not self._calls(later).exists():
                break
            self._calls(later).unlink()
        self.version = version
        self.server = self._opened(manifest)

    def close(self) -> None:
        """Let go of the folder."""
        self.server.close()

    def _opened(self, manifest: Manifest) -> ShardServer:
        """The version in force, and all calls since."""
        calls: list[Call] = []
        log: CallLog | None = None
        for number in itertools.count(manifest.version):
            if not self._calls(number).exists():
                break
            if log is not None:
                log.close()
            log, more = CallLog.reopen(self._calls(number), manifest.log_id(self.shard))
            calls += more
            self.version = number
        if log is None:
            log = self._new_log(manifest.version)
        if manifest.version:
            return ShardServer.restored(self._checkpoint(manifest.version), log, calls)
        return ShardServer.replayed(manifest.new_bank(self.shard), log, calls)

    def _new_log(self, version: int) -> CallLog:
        manifest = read_manifest(self.path)
        return CallLog.create(self._calls(version), manifest.log_id(self.shard))

    def _calls(self, version: int) -> Path:
        return self.folder / f"calls-{version}"

    def _checkpoint(self, version: int) -> Path:
        return self.folder / f"checkpoint-{version}"
