"""Shards: what is known of 65,536 of a bank's rows, as immutable safetensors files.

Live rows lie in one file. Usage, which reading changes, lies in another, so that reads do not
make rows be written anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import safetensors
import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.manifest import Arguments, File, Shard
from sparsemem.indexes.factory import PRODUCT_KEY

if TYPE_CHECKING:
    from sparsemem.bank.store import RowStore

SHARD_ROWS = 65_536
TABLES = ("keys", "values")
# Columns of a bank's book.
ENTRIES = {"frozen": torch.bool, "tags": torch.int64, "expiry": torch.int64}
USAGE = {"last_access": torch.int64, "accesses": torch.int64, "background": torch.int32}

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype, and shape of one row's part


class Layout(NamedTuple):
    """The tables of a bank: what its files must fit."""

    num_rows: int
    rows: Fields  # fields of live rows
    usage: Fields
    keys: Fields  # sub-keys of product keys, which have no row for each id

    @classmethod
    def of(cls, arguments: Arguments) -> Layout:
        """The layout that a bank's arguments ask for."""
        num_rows, width, dtype = arguments.num_rows, arguments.width, _dtype(arguments)
        rows: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (kind, ()) for name, kind in ENTRIES.items()
        }
        keys = {}
        if arguments.index == PRODUCT_KEY:
            keys = {"keys": (dtype, (2, round(num_rows**0.5), width // 2))}
        else:
            rows["keys"] = (dtype, (width,))
        if arguments.value_width is not None:
            rows["values"] = (dtype, (arguments.value_width,))
        return cls(num_rows, rows, {name: (kind, ()) for name, kind in USAGE.items()}, keys)

    @property
    def num_shards(self) -> int:
        """How many shards cover all rows."""
        return -(-self.num_rows // SHARD_ROWS)


def _dtype(arguments: Arguments) -> torch.dtype:
    return getattr(torch, arguments.dtype)  # type: ignore[no-any-return]


def take_rows(bank: RowStore, layout: Layout, number: int) -> dict[str, Tensor] | None:
    """Copies of a shard's live rows and of what is known of them; None: as in a new bank."""
    part = slice(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
    live = bank.book.live[part]
    taken = _take(bank, live.nonzero().squeeze(1) + part.start, layout.rows)
    if layout.keys:  # a new bank with product keys has all rows, and zeros in them
        new = bool(live.all()) and not any(taken[name].any() for name in layout.rows)
    else:
        new = not len(taken["ids"])
    return None if new else taken


def take_usage(bank: RowStore, layout: Layout, number: int) -> dict[str, Tensor] | None:
    """Copies of the usage of those of a shard's rows that were ever accessed, live or not."""
    part = slice(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
    ids = bank.book.last_access[part].nonzero().squeeze(1) + part.start
    return _take(bank, ids, layout.usage) if len(ids) else None


def put_live(bank: RowStore, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
    """Fill a shard of a new bank with what `take_rows` took: these rows are live, and no others."""
    part = slice(shard.shard * SHARD_ROWS, (shard.shard + 1) * SHARD_ROWS)
    bank.book.live[part] = False
    bank.book.live.index_fill_(0, tensors["ids"].to(bank.keys.device), True)
    put_rows(bank, tensors)


def put_rows(bank: RowStore, tensors: Mapping[str, Tensor]) -> None:
    """Fill a bank's tables and book with what `take_rows` or `take_usage` took.

    What is derived from them is not told: `bank.rebind()` when all is in place.
    """
    moved = {name: tensor.to(bank.keys.device) for name, tensor in tensors.items()}
    ids = moved.pop("ids")
    for name, tensor in moved.items():
        column(bank, name).index_copy_(0, ids, tensor)


def column(bank: RowStore, name: str) -> Tensor:
    """A table of a bank or a column of its book, by name."""
    found: Tensor = getattr(bank if name in TABLES else bank.book, name)
    return found.data


def _take(bank: RowStore, ids: Tensor, fields: Fields) -> dict[str, Tensor]:
    return {"ids": ids, **{name: column(bank, name).index_select(0, ids) for name in fields}}


def read_shard(folder: Path, shard: Shard, layout: Layout, fields: Fields) -> dict[str, Tensor]:
    """The tensors of a shard's file, checked to be those of a bank: `fields` of distinct rows."""
    tensors = read_file(folder, shard)
    check_fields(tensors, fields, shard.rows, shard.file)
    start = shard.shard * SHARD_ROWS
    check_ascending(tensors["ids"], start, min(start + SHARD_ROWS, layout.num_rows), shard.file)
    check_numbers(tensors, shard.file)
    return tensors


def read_keys(folder: Path, file: File, layout: Layout) -> dict[str, Tensor]:
    """The checked sub-keys of a bank with product keys."""
    tensors = read_file(folder, file)
    check_tensors(tensors, layout.keys, file.file)
    check_numbers(tensors, file.file)
    return tensors


def read_file(folder: Path, file: File) -> dict[str, Tensor]:
    """The tensors of a file whose size and checksum are those of the manifest."""
    path = folder / file.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"cannot read {path}: {error.strerror}") from None
    if len(data) != file.bytes:
        raise DamagedError(f"{path} is torn: {len(data)} bytes, expected {file.bytes}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise DamagedError(
            f"{path} is damaged: its sha256 is {digest[:12]}..., expected {file.sha256[:12]}..."
        )
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(f"{path} is not a safetensors file: {error}") from None


def check_fields(tensors: Mapping[str, Tensor], fields: Fields, count: int, place: str) -> None:
    """Refuse tensors other than `ids` and these fields of `count` rows."""
    of_rows = {name: (dtype, (count, *shape)) for name, (dtype, shape) in fields.items()}
    check_tensors(tensors, {"ids": (torch.int64, (count,)), **of_rows}, place)


def check_tensors(tensors: Mapping[str, Tensor], expected: Fields, place: str) -> None:
    """Refuse tensors of other names, dtypes or shapes than expected."""
    if tensors.keys() != expected.keys():
        raise BankError(f"{place} holds {sorted(tensors)}, expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or found.shape != shape:
            raise BankError(
                f"{place}: {name} is {found.dtype} {list(found.shape)},"
                f" expected {dtype} {list(shape)}"
            )


def check_numbers(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuse NaN and infinite numbers in rows, naming the first such row."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float64).isfinite()):
            continue
        bad = (~tensor.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            row = int(tensors["ids"][bad[0]]) if "ids" in tensors else int(bad[0])
            raise BankError(f"{place}: {name} of row {row} hold NaN or infinity")


def check_ascending(ids: Int[Tensor, " n"], start: int, stop: int, place: str) -> None:
    """Refuse ids that are not ascending row numbers from `start` to `stop` - 1."""
    if len(ids) and not (
        start <= int(ids[0]) and int(ids[-1]) < stop and bool((ids.diff() > 0).all())
    ):
        raise BankError(f"{place}: ids are not ascending row numbers from {start} to {stop - 1}")
