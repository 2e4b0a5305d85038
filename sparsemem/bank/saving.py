"""The files of a bank's tables, and the manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from sparsemem.bank.errors import BankError
from sparsemem.bank.journal import encode_tensors
from sparsemem.bank.manifest import MANIFEST, Arguments, File, Manifest, Shard, encode_manifest
from sparsemem.bank.shards import Layout, check_numbers, column, take_rows, take_usage
from sparsemem.bank.store import RowStore
from sparsemem.files import sync_folder, write_synced

Take = Callable[[RowStore, Layout, int], dict[str, Tensor] | None]


def start_manifest(bank: RowStore, *, durable: bool, sync: bool) -> Manifest:
    """The manifest of a new folder, without files."""
    return Manifest(
        bank=uuid.uuid4().hex,
        durable=durable,
        sync=sync,
        save=0,
        sequence=0,
        clock=bank.book.now,
        batches=int(bank.book.batches),
        arguments=arguments_of(bank),
        keys=None,
        rows=[],
        usage=[],
    )


def write_new(bank: RowStore, folder: Path, start: Manifest) -> Manifest:
    """Write all of a bank into a folder, and the manifest."""
    every = torch.ones(Layout.of(start.arguments).num_shards, dtype=torch.bool)
    manifest = write_files(bank, folder, start, start, every, every)
    write_synced(folder / MANIFEST, encode_manifest(manifest))
    return manifest


def write_files(
    bank: RowStore,
    folder: Path,
    start: Manifest,
    old: Manifest,
    rows: Bool[Tensor, " S"],
    usage: Bool[Tensor, " S"],
) -> Manifest:
    """Write the marked shards; `start` with them and with the old ones that still hold."""
    layout = Layout.of(start.arguments)
    keys = None
    if layout.keys:
        with bank.table.lock.read():
            taken = {"keys": column(bank, "keys").clone()}
        keys = _write_file(folder, f"keys-{start.save:08d}.safetensors", taken, old.keys)

    def write(name: str, take: Take, known: Iterable[Shard], marks: Tensor) -> list[Shard]:
        shards = {shard.shard: shard for shard in known}
        for number in marks.nonzero().squeeze(1).tolist():
            with bank.table.lock.read():
                tensors = take(bank, layout, number)
            before = shards.pop(number, None)
            if tensors is not None:
                file = f"{name}-{number:05d}-{start.save:08d}.safetensors"
                shards[number] = _write_shard(folder, file, number, tensors, before)
        return [shards[number] for number in sorted(shards)]

    written = {
        "keys": keys,
        "rows": write("rows", take_rows, old.rows, rows),
        "usage": write("usage", take_usage, old.usage, usage),
    }
    sync_folder(folder)
    return start.model_copy(update=written)


def _write_shard(
    folder: Path, name: str, number: int, tensors: Mapping[str, Tensor], old: Shard | None
) -> Shard:
    file = _write_file(folder, name, tensors, old)
    return Shard(
        file=file.file,
        bytes=file.bytes,
        sha256=file.sha256,
        shard=number,
        rows=len(tensors["ids"]),
    )


def _write_file(folder: Path, name: str, tensors: Mapping[str, Tensor], old: File | None) -> File:
    """Write a file, unless the old one has the same contents."""
    check_numbers(tensors, "the bank cannot be saved")
    data = encode_tensors(tensors)
    digest = hashlib.sha256(data).hexdigest()
    if old is not None and old.sha256 == digest:
        return old
    write_synced(folder / name, data)
    return File(file=name, bytes=len(data), sha256=digest)


def arguments_of(bank: RowStore) -> Arguments:
    """What a bank is made with."""
    try:
        json.dumps(bank.arguments, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BankError(f"the bank's arguments cannot be saved, expected JSON: {error}") from None
    return Arguments(**bank.arguments)
