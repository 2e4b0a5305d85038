"""Versions of a sharded bank: a save makes one, a restore goes back to one, others look at one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sparsemem.bank import MemoryBank
from sparsemem.bank.errors import BankError
from sparsemem.distributed.fetched import Known
from sparsemem.distributed.home import Manifest, read_checkpoint, read_manifest, write_manifest
from sparsemem.distributed.reshard import Whole, begun, every, plain_bank
from sparsemem.distributed.stepping import Stepping


class Versioned(Stepping):
    """A client that makes versions, and goes back to them."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Numbers of the versions that there are, ascending. 0 is the bank as it was created."""
        return tuple(sorted(read_manifest(self.path).clocks))

    def save(
        self, alongside: Callable[[int], object] | None = None, keep: Collection[int] = ()
    ) -> None:
        """Make a version of all rows, optimisers and usage: a crash goes on from there.

        What was written since is in the shards' logs, and as safe; a save shortens them.

        Args:
            alongside: is given the version's number once all shards have written theirs, to write
                down what belongs to it; only then is the version in force. So what it wrote counts
                if `versions` has that number, which no save that failed shares. If it raises, the
                version before stays in force.
            keep: earlier versions that stay, to `restore`. All others go.
        """
        manifest = read_manifest(self.path)
        kept = {version: manifest.clock_of(version, "keep holds") for version in sorted(keep)}
        # A number that no attempt before has used, so that all shards write down this moment.
        version = 1 + max(number for number, _ in self._ask("standing", ()))
        clock = self.clock
        self._ask("checkpoint", (version,))
        if alongside is not None:
            alongside(version)
        self._put_in_force(manifest, version=version, log=version, clock=clock, kept=kept)
        self._ask("forget", ())

    def restore(self, version: int | None = None) -> None:
        """Go back to a version, in all shards, optimisers and usage with it.

        What came after it has not happened. Other versions stay, later ones too, until the next
        `save` says what to keep. Other clients of the shards have to be made anew.

        Args:
            version: one of `versions`; None: the one in force, that is the last that was saved or
                gone back to.
        """
        manifest = read_manifest(self.path).at(version)
        self.shards.drop()
        self._behind = 0
        self._factors.clear()
        log = 1 + max(number for number, _ in self._ask("standing", ()))
        self._put_in_force(manifest, log=log)
        self._ask("restore", ())
        self.clock = manifest.clock
        self._known = Known(self.placement.num_shards)

    def _put_in_force(self, manifest: Manifest, **changed: Any) -> None:
        self._manifest = manifest.model_copy(update=changed)
        write_manifest(self.path, self._manifest)


def read_version(path: str | Path, version: int | None = None) -> MemoryBank:
    """A version's rows as one bank in memory, with tags, expiry and usage; optimisers are left out.

    The folder stays as it is. Its shards may be gone, or at work: nobody has to wait. ValueError
    for a version that there is not, BankError for a damaged one.

    Args:
        path: the folder of a sharded bank.
        version: None: the one in force.
    """
    path = Path(path)
    while True:
        manifest = read_manifest(path).at(version)
        try:
            return plain_bank(whole_version(path, manifest))
        except BankError:
            if manifest.version in read_manifest(path).clocks:
                raise  # else a save has removed it meanwhile: take the newer one, or say so


def whole_version(path: Path, manifest: Manifest) -> Whole:
    """All that the shards' banks held at the manifest's version."""
    whole = begun(path, manifest)
    for shard in range(manifest.num_shards):
        bank = read_checkpoint(path, manifest, shard)
        whole.enter(bank, every(shard, manifest.num_shards))
        bank.close()
    return whole
