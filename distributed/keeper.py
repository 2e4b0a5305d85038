"""Checkpoints of runs over shards: each names the version of the bank that it goes with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsemem.bank import MemoryBank
from sparsemem.bank.errors import BankError, write_errors
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.home import read_manifest
from sparsemem.distributed.versions import read_version
from sparsemem.files import replace_file
from sparsemem.training.banks import Write, with_tables
from sparsemem.training.checkpoint import Checkpoint, list_checkpoints
from sparsemem.training.checkpoint import read_manifest as read_checkpoint
from sparsemem.training.errors import CheckpointError, RunError
from sparsemem.training.run import RunFolder

BANK, STATS = "bank", "stats.json"  # in a run's folder
VERSION = "version"  # of a checkpoint's values of its bank


class Versions:
    """The keeper of a sharded bank that is trained: a checkpoint goes with a version of it.

    Args:
        bank: of this member of the team.
        run: where the checkpoints are, and the latest figures of all shards (stats.json).
    """

    def __init__(self, bank: ShardedBank, run: RunFolder) -> None:
        self.bank, self.run = bank, run

    def save(self, write: Write) -> Path:
        """Write the checkpoint once all shards have theirs: the bank's manifest commits both."""
        written: list[Path] = []
        named = {version_of(path) for _, path in list_checkpoints(self.run.checkpoints)}
        self.bank.save(
            lambda version: written.append(write({VERSION: version})),
            [version for version in self.bank.versions if version in named],
        )
        with write_errors(self.run.path):
            stats = json.dumps(self.bank.stats(), indent=1)
            replace_file(self.run.path / STATS, stats.encode())
        return written[0]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Check that the rows are the checkpoint's: `go_back` has seen to that, for all."""
        version, there = version_in(checkpoint.manifest), read_manifest(self.bank.path).version
        if version != there:
            raise CheckpointError(
                f"{checkpoint.path} goes with version {version} of the bank, expected {there}, to"
                f" which {self.bank.path} has gone back"
            )


class LoadedVersion:
    """The keeper of a bank in memory that takes the rows of versions of a sharded one's folder."""

    def __init__(self, bank: MemoryBank, path: Path) -> None:
        self.bank, self.path = bank, path

    def save(self, write: Write) -> Path:
        """Refuse: a run goes on with its shards."""
        raise RunError(f"the rows are in {self.path}: expected --shards, to train them")

    def restore(self, checkpoint: Checkpoint) -> None:
        """The rows of the version that the checkpoint goes with."""
        version = version_in(checkpoint.manifest)
        try:
            loaded = read_version(self.path, version)
        except (ValueError, BankError) as error:
            raise CheckpointError(f"{checkpoint.path}: its rows: {error}") from None
        with_tables(loaded, self.path, self.bank)


def version_of(path: Path) -> int | None:
    """The version that a checkpoint goes with; None: it says none."""
    return version_in(read_checkpoint(path))


def version_in(manifest: Mapping[str, Any]) -> int | None:
    """The version that a checkpoint's manifest names."""
    bank = manifest.get("bank")
    return None if bank is None else bank.get(VERSION)


def go_back(run: RunFolder, bank: ShardedBank) -> Path | None:
    """Take a run and its bank back to the newest checkpoint that was committed; None: to the start.

    Checkpoints of saves that were cut short are removed, and what was recorded after. Other clients
    of the bank have to be made anew.
    """
    there = bank.versions
    found = list_checkpoints(run.checkpoints)
    committed = [(step, path) for step, path in found if version_of(path) in there]
    step, newest = committed[-1] if committed else (0, None)
    for later, path in found:
        if later > step:
            shutil.rmtree(path)
    if newest is None and 0 not in there:
        raise RunError(
            f"{run.checkpoints} has no checkpoint that goes with the bank in {bank.path}, which is"
            f" at version {max(there)}: expected one"
        )
    if newest is not None or bank.clock:  # else nobody has asked it for anything
        bank.restore(0 if newest is None else version_of(newest))
    run.cut_metrics(step)
    return newest
