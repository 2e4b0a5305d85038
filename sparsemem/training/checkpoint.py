"""Checkpoints: a folder with tensors (safetensors) and a JSON manifest with checksums.

    checkpoints/step-00001000/tensors.safetensors
    checkpoints/step-00001000/manifest.json
    checkpoints/step-00001000/bank/            a snapshot of the bank, of a run with one
                                               (docs/bank-format.md)

A checkpoint appears whole or not at all, and is checked whole (format, checksums) before
anything is taken from it. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor

from sparsemem.files import new_folder, write_synced
from sparsemem.training.errors import CheckpointError, DamagedError

FORMAT = "sparsemem checkpoint"
VERSION = 1
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"


class _File(BaseModel):
    bytes: int
    sha256: str


class _Files(BaseModel):
    tensors: _File = Field(alias="tensors.safetensors")  # TENSORS; mypy wants it literal


class _Model(BaseModel):
    name: str


class _Task(BaseModel):
    identity: str


class _Optimizer(BaseModel):
    scalars: dict[str, Any]
    param_groups: list[dict[str, Any]]


class _Bank(BaseModel):
    optimizer: _Optimizer
    schedule: dict[str, Any]


class _Manifest(BaseModel):
    """What must be in a manifest, to say so before anything is taken from it."""

    step: NonNegativeInt
    files: _Files
    model: _Model
    task: _Task
    optimizer: _Optimizer
    schedule: dict[str, Any]
    curriculum: dict[str, Any]
    sums: dict[str, float]
    validation: dict[str, float] | None
    best: dict[str, float] | None
    seconds: float
    bank: _Bank | None = None


class Checkpoint(NamedTuple):
    """What a checkpoint holds: named tensors, and everything else as JSON values."""

    tensors: dict[str, Tensor]
    manifest: dict[str, Any]
    path: Path

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix.`, by the rest of their names."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a folder of checkpoints."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the checkpoints in a folder, oldest first."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else ():
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return sorted(found)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    fill: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of a step; returns its path.

    fill: called with the folder that is being written, to put more into it.

    Written beside and renamed once it is on the disk: a full disk, a missing permission
    or a crash raises CheckpointError and leaves the earlier checkpoints as they were.
    """
    path = checkpoint_path(folder, step)
    # A copy each: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    data = safetensors.torch.save({name: copy.contiguous() for name, copy in copies.items()})
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "files": {TENSORS: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
        "torch": torch.__version__,
        **state,
    }
    manifest = json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False)
    try:
        with new_folder(path) as beside:
            if fill is not None:
                fill(beside)
            write_synced(beside / TENSORS, data)
            write_synced(beside / MANIFEST, manifest.encode())
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {path}: {error.strerror or error};"
            " earlier checkpoints are as they were"
        ) from error
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint; CheckpointError says which file is wrong and why."""
    manifest = read_manifest(path)
    file = path / TENSORS
    expected = manifest["files"][TENSORS]
    data = _read(file)
    if len(data) != expected["bytes"]:
        raise DamagedError(f"{file} is torn: {len(data)} bytes, expected {expected['bytes']}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected["sha256"]:
        raise DamagedError(
            f"{file} is damaged: its sha256 is {digest[:12]}..., expected"
            f" {expected['sha256'][:12]}..."
        )
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
    return Checkpoint(tensors, manifest, path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a checkpoint, without its tensors."""
    file = path / MANIFEST
    try:
        manifest = json.loads(_read(file), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise DamagedError(f"{file} is torn: expected a JSON object") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a manifest of a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has format version {manifest.get('version')!r}, expected {VERSION}"
        )
    digest = manifest.pop("sha256", None)
    if digest != _digest(manifest):
        raise DamagedError(f"{file} is damaged: its contents do not match their sha256")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise CheckpointError(
            f"{file} is not of this version of sparsemem: {place}: {detail['msg']}"
        ) from None
    return manifest


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the best one, and what a crash left."""
    for unfinished in folder.glob(".step-*.part"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for step, path in list_checkpoints(folder)[:-keep]:
        if step != best:
            shutil.rmtree(path, ignore_errors=True)


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, model: str
) -> None:
    """Refuse tensors that are not those of a model: names, shapes and dtypes must agree."""
    for name in sorted(found.keys() ^ expected.keys()):
        missing = name in expected
        raise CheckpointError(
            f"{path} is of another model: it {'lacks' if missing else 'has'} the parameter"
            f" {name!r}, which {model} as configured {'has' if missing else 'lacks'}"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{path} is of another model: parameter {name!r} is"
                f" {found[name].dtype} {list(found[name].shape)}, expected"
                f" {tensor.dtype} {list(tensor.shape)}"
            )


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state split into tensors by name `<parameter>.<key>`, and JSON values."""
    state = optimiser.state_dict()
    entries = {
        f"{parameter}.{key}": value
        for parameter, parts in state["state"].items()
        for key, value in parts.items()
    }
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in entries.items() if name not in tensors}
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimiser_tensors` took apart."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **values["scalars"]}.items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"cannot read checkpoint file {file}: No such file") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint file {file}: {error.strerror}") from None


def _digest(body: Mapping[str, Any]) -> str:
    """Checksum of the manifest's own contents, free of spaces and key order."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
