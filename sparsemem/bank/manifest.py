"""The manifest of a bank's folder: what the bank is and which files hold it, with checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from sparsemem.bank.errors import BankError, DamagedError

FORMAT = "sparsemem bank"
VERSION = 1
MANIFEST = "manifest.json"
_BLANK = "0" * 64  # stands for the manifest's own checksum while it is computed
_NAME = r"^(rows|usage|keys)(-\d{5,})?-\d{8,}\.safetensors$"  # no way out of the folder


class File(BaseModel, extra="forbid", frozen=True):
    """A file of the folder."""

    file: str = Field(pattern=_NAME)
    bytes: NonNegativeInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Shard(File, extra="forbid", frozen=True):
    """A file with the live rows among 65,536 of a bank's rows."""

    shard: NonNegativeInt
    rows: NonNegativeInt  # how many are in it


class Arguments(BaseModel, extra="allow", frozen=True):
    """What a bank is made with; what is not listed here are options of its index."""

    num_rows: PositiveInt
    width: PositiveInt
    value_width: PositiveInt | None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    metric: str
    index: str


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What a folder's files mean together."""

    format: Literal["sparsemem bank"] = "sparsemem bank"
    version: Literal[1] = 1
    bank: str = Field(pattern=r"^[0-9a-f]{32}$")  # an id that its logs carry too
    durable: bool  # changes are logged; otherwise a snapshot
    sync: bool  # each record of a log is waited for
    save: NonNegativeInt  # number of the save that wrote this; logs from this number on follow
    sequence: NonNegativeInt  # number of the first record of the first of these logs
    clock: NonNegativeInt
    batches: NonNegativeInt  # of the background
    arguments: Arguments
    keys: File | None  # sub-keys of a bank with product keys
    rows: list[Shard]
    usage: list[Shard]

    @property
    def files(self) -> list[File]:
        """All files that belong to the bank, but for its logs."""
        return [*([self.keys] if self.keys else []), *self.rows, *self.usage]


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON whose `sha256` is that of these bytes with 64 zeros in its place."""
    body = {"sha256": _BLANK, **manifest.model_dump()}
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(_BLANK, digest, 1).encode()


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of a bank's folder; BankError says what is wrong with it."""
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BankError(f"{path} is no bank: there is no {MANIFEST} in it") from None
    except OSError as error:
        raise BankError(f"cannot read {file}: {error.strerror}") from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedError(f"{file} is damaged: expected a JSON object") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise BankError(f"{file} is not the manifest of a {FORMAT}")
    if body.get("version") != VERSION:
        raise BankError(f"{file} has format version {body.get('version')!r}, expected {VERSION}")
    _check_digest(file, data, body.pop("sha256", None))
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise BankError(
            f"{file} is not of this version of sparsemem: {place}: {detail['msg']}"
        ) from None


def _check_digest(file: Path, data: bytes, digest: object) -> None:
    if isinstance(digest, str) and len(digest) == len(_BLANK):
        blank = data.replace(digest.encode(), _BLANK.encode(), 1)
        if hashlib.sha256(blank).hexdigest() == digest:
            return
    raise DamagedError(f"{file} is damaged: its contents do not match their sha256")
