"""Writing files so that a crash or a full disk leaves the old ones whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries (new names, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends well, or never."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place of another: a reader sees the old one or the new one, whole."""
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which appears as `path` when the block ends well, or never.

    Raises OSError where `path` is there already, unless it is an empty folder.
    """
    beside = path.with_name(f".{path.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # what a crash may have left
    try:
        beside.mkdir(parents=True)
        yield beside
        sync_folder(beside)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_folder(path.parent)


def place_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder that appears with all its files in it, or not at all."""
    with new_folder(path) as folder:
        for name, data in files.items():
            write_synced(folder / name, data)
