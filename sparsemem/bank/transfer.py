"""Rows in and out of banks: NumPy files, FAISS indices, embeddings. No pickle is ever read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.errors import BankError, write_errors
from sparsemem.bank.folder import check_new_place, create_folder
from sparsemem.bank.manifest import Arguments
from sparsemem.bank.recovery import open_folder, read_bank
from sparsemem.bank.tables import RAM
from sparsemem.checks import check_size
from sparsemem.files import new_file
from sparsemem.indexes.base import check_ids
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY
from sparsemem.indexes.kinds import faiss_module, new_faiss_index
from sparsemem.indexes.metrics import Metric, inverse_norm

CHUNK = 65_536  # rows moved at once
TRAINING_ROWS = 1 << 18  # that a FAISS index is trained on, at most
WEIGHT = "weight"  # name of an embedding's table in a safetensors file


def from_rows(
    rows: Float[Tensor, "n W"],
    values: Float[Tensor, "n V"] | None = None,
    *,
    ids: Int[Tensor, " n"] | None = None,
    num_rows: int | None = None,
    path: str | Path | None = None,
    sync: bool = False,
    **options: Any,
) -> MemoryBank:
    """A bank with these rows.

    Args:
        rows: keys.
        values: None: the keys are the values.
        ids: where the rows go, distinct; None: 0 .. n-1.
        num_rows: of the bank; None: n, or as many as `ids` ask for.
        path, sync: as for `MemoryBank`; the folder appears with all rows in it, or not at all.
        options: others of `MemoryBank`; dtype is that of `rows` unless it is given.
    """
    if path is not None:
        check_new_place(path)
    for name, tensor in (("rows", rows), ("values", values)):
        if tensor is not None and (tensor.ndim != 2 or len(tensor) != len(rows)):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{len(rows)}, *]")
    ids, num_rows = _places(len(rows), ids, num_rows)
    value_width = None if values is None else values.shape[1]
    bank = MemoryBank(num_rows, rows.shape[1], value_width, **{"dtype": rows.dtype, **options})
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        given = None if values is None else values[part].to(bank.keys.device)
        bank.write(ids[part].to(bank.keys.device), rows[part].to(bank.keys.device), given)
    if path is not None:
        bank.journal = create_folder(bank, path, sync)
    return bank


def _places(count: int, ids: Tensor | None, num_rows: int | None) -> tuple[Tensor, int]:
    """Where `count` rows go, and the number of rows of their bank."""
    every = ids is None
    if ids is None:
        ids = torch.arange(count)
    elif len(ids) != count:
        raise ValueError(f"ids has {len(ids)} entries, expected {count}, one for each row")
    if num_rows is None:
        num_rows = max(1, int(ids.max()) + 1) if len(ids) else 1
    check_size("num_rows", num_rows)
    if every and num_rows < count:
        raise ValueError(f"num_rows is {num_rows}, expected at least {count}, one a row")
    check_ids(ids, num_rows)
    return ids, num_rows


def from_embedding(embedding: nn.Embedding, **options: Any) -> MemoryBank:
    """A bank with the rows of an embedding, under their own ids; its padding row is not live.

    options: those of `from_rows`.
    """
    rows = embedding.weight.detach()
    ids = torch.arange(len(rows), device=rows.device)
    if embedding.padding_idx is not None:
        ids = ids[ids != embedding.padding_idx]
    return from_rows(rows[ids], ids=ids, **{"num_rows": len(embedding.weight), **options})


def open_rows(path: str | Path) -> MemoryBank:
    """A copy of a folder's bank in memory, searched by a scan; the folder is left alone.

    Product keys stay product keys.
    """
    path = Path(path)
    manifest, lock = open_folder(path)
    try:
        own = manifest.arguments
        plain = Arguments(**{name: getattr(own, name) for name in Arguments.model_fields})
        if plain.index != PRODUCT_KEY:  # which is a part of what the bank is
            plain = plain.model_copy(update={"index": EXACT})
        manifest = manifest.model_copy(update={"arguments": plain})
        return read_bank(MemoryBank, path, manifest, storage=RAM, device=None)[0]
    finally:
        if lock is not None:
            os.close(lock)


def read_table(path: str | Path) -> Float[Tensor, "n W"]:
    """The rows of a file: a .npy array [n, W], or an embedding's `weight` in a .safetensors file.

    BankError says what is wrong with the file. Files that are pickles (.pt, .bin, .pkl) are
    refused by name: reading one would run what is in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            rows = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                rows = file.get_tensor(WEIGHT)
        else:
            raise BankError(
                f"{path} is neither a .npy nor a .safetensors file; pickles (.pt, .bin) are not"
                " read: save the weights by safetensors.torch.save_file({'weight': ...}, path)"
            )
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, safetensors.SafetensorError) as error:
        raise BankError(f"cannot read {path}: {error}") from None
    if rows.ndim != 2 or not rows.is_floating_point():
        raise BankError(f"{path} holds {rows.dtype} {list(rows.shape)}, expected floats [n, W]")
    return rows


def export_npy(bank: MemoryBank, path: str | Path, table: str = "keys") -> tuple[Path, Path]:
    """Write the live rows of a table, "keys" or "values", as a .npy array [n, W].

    Their ids [n], ascending, go into a file beside it: rows.npy, rows.ids.npy. NumPy has no
    bfloat16: such rows become float32, which is exact. Returns both paths. BankError for product
    keys, whose rows are not stored, and where a file cannot be written.
    """
    path = Path(path)
    source, ids = _table(bank, table), _live(bank)
    dtype = torch.float32 if source.dtype == torch.bfloat16 else source.dtype
    descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (len(ids), source.shape[1])}
    with write_errors(path), new_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, rows in _chunks(source, ids):
            file.write(rows.to(dtype).numpy(force=True).tobytes())
    beside = path.with_suffix(".ids.npy")
    with write_errors(beside), new_file(beside) as file:
        np.save(file, ids.numpy(force=True))
    return path, beside


def export_faiss(
    bank: MemoryBank, path: str | Path, factory: str = "Flat", table: str = "keys"
) -> Path:
    """Write a FAISS index of the live rows of a table, whose labels are the row ids.

    factory: FAISS factory string. The metric is the bank's; for `cosine`, the rows are scaled to
    length 1 and the index's metric is the inner product. ImportError without FAISS.
    """
    path = Path(path)
    source, ids = _table(bank, table), _live(bank)
    faiss = faiss_module()
    index = new_faiss_index(factory, source.shape[1], bank.metric)
    if not index.is_trained:
        if not len(ids):
            raise BankError(f"the index {factory!r} is trained on rows, and the bank has none")
        sample = ids[torch.linspace(0, len(ids) - 1, min(len(ids), TRAINING_ROWS)).long()]
        with _faiss_errors(factory, len(sample)):
            index.train(_faiss_rows(source[sample], bank.metric))
    labelled = faiss.IndexIDMap2(index)
    for part, rows in _chunks(source, ids):
        with _faiss_errors(factory, len(ids)):
            labelled.add_with_ids(_faiss_rows(rows, bank.metric), part.numpy(force=True))
    with write_errors(path), new_file(path) as file:
        faiss.write_index(labelled, faiss.PyCallbackIOWriter(file.write))
    return path


@contextmanager
def _faiss_errors(factory: str, count: int) -> Iterator[None]:
    """Turn what FAISS says of too few rows, or of rows that it cannot take, into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].split(": ")[-1]
        raise BankError(
            f"the index {factory!r} cannot be made of {count} rows (FAISS: {reason})"
        ) from error


def _table(bank: MemoryBank, name: str) -> Tensor:
    if name not in ("keys", "values"):
        raise ValueError(f"table is {name!r}, expected 'keys' or 'values'")
    table = bank.keys if name == "keys" else bank.values
    if table is None:
        raise BankError("the bank has no values: its keys are its values")
    if name == "keys" and bank.has_product_keys:
        raise BankError(
            "the bank has product keys, whose rows are pairs of sub-keys and not stored:"
            " expected its values (--values)"
        )
    return table.detach()


def _live(bank: MemoryBank) -> Tensor:
    return bank.book.live.nonzero().squeeze(1)


def _chunks(table: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        yield part, table.index_select(0, part)


def _faiss_rows(rows: Tensor, metric: Metric) -> Any:
    rows = rows.float()
    if metric is Metric.cosine:
        rows = rows * inverse_norm(rows).unsqueeze(1)
    return rows.numpy(force=True)
