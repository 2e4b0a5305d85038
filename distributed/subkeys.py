"""The sub-keys of a sharded bank with product keys: a file beside the shards for each version.

    PATH/subkeys-7.safetensors    `subkeys` [2, S, W/2] at version 7, and their checksum

Letters: N = S * S rows, W width of keys. They are small, so every client has all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.bank import MemoryBank
from sparsemem.bank.errors import BankError, DamagedError, write_errors
from sparsemem.bank.journal import encode_tensors
from sparsemem.bank.rows import fill_normal
from sparsemem.files import replace_file
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY
from sparsemem.indexes.product_key import num_subkeys

SUBKEYS, CRC = "subkeys", "crc32"


def new_subkeys(
    num_rows: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> Float[Tensor, "2 S D"]:
    """Those that a `MemoryBank` begins with: N(0, 1/W)."""
    subkeys = torch.empty(2, num_subkeys(num_rows), width // 2, dtype=dtype)
    fill_normal(subkeys.flatten(0, -2), generator, width**-0.5)
    return subkeys


def check_product(num_rows: int, arguments: dict[str, Any]) -> None:
    """Refuse what a `MemoryBank` with product keys is not made of, in its words."""
    num_subkeys(num_rows)
    given = {**arguments, "dtype": getattr(torch, arguments["dtype"])}
    MemoryBank(1, **given).close()


def of_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the shards' banks are made with: their rows are the values, which nobody searches."""
    values = {"width": arguments["value_width"], "value_width": None, "index": EXACT}
    return arguments | values


def of_pairs(arguments: dict[str, Any], width: int) -> dict[str, Any]:
    """What the `MemoryBank` is made with that holds the same: `of_values` undone."""
    pairs = {"width": width, "value_width": arguments["width"], "index": PRODUCT_KEY}
    return arguments | pairs


def write_subkeys(path: Path, version: int, subkeys: Float[Tensor, "2 S D"]) -> None:
    """Put a version's sub-keys into a sharded bank's folder.

    BankError where that fails, or where they hold NaN or infinity.
    """
    place = place_of(path, version)
    if not subkeys.isfinite().all():
        raise BankError(f"cannot write {place}: sub-keys hold NaN or infinity")
    tensors = {SUBKEYS: subkeys, CRC: torch.tensor(checksum(subkeys))}
    with write_errors(place):
        replace_file(place, encode_tensors(tensors))


def read_subkeys(
    path: Path, version: int, num_rows: int, width: int, dtype: torch.dtype
) -> Float[Tensor, "2 S D"]:
    """A version's sub-keys; BankError where there are none, DamagedError where they are torn."""
    place, shape = place_of(path, version), (2, num_subkeys(num_rows), width // 2)
    try:
        found = safetensors.torch.load(place.read_bytes())
        subkeys, crc = found[SUBKEYS], int(found[CRC])
    except OSError as error:
        raise BankError(f"cannot read {place}: {error.strerror or error}") from error
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{place} is damaged: {error}, expected sub-keys") from error
    if subkeys.dtype != dtype or subkeys.shape != shape:
        raise DamagedError(
            f"{place} holds {subkeys.dtype} {list(subkeys.shape)}, expected {dtype} {list(shape)}"
        )
    if checksum(subkeys) != crc:
        raise DamagedError(f"{place} is damaged: its numbers do not match their crc32")
    return subkeys


def keep_subkeys(path: Path, versions: Collection[int]) -> None:
    """Remove the files of all other versions."""
    kept = {place_of(path, version) for version in versions}
    for file in path.glob(f"{SUBKEYS}-*.safetensors"):
        if file not in kept:
            file.unlink(missing_ok=True)


def place_of(path: Path, version: int) -> Path:
    """A version's file in a sharded bank's folder."""
    return path / f"{SUBKEYS}-{version}.safetensors"


def checksum(subkeys: Tensor) -> int:
    """CRC-32 of their bytes."""
    return zlib.crc32(subkeys.detach().contiguous().view(torch.uint8).numpy().tobytes())
