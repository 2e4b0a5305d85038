"""Checks of a bank's arguments, before anything changes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemem.bank.rows import ROW_DTYPES
from sparsemem.checks import check_at_most, check_finite, check_fraction, check_size
from sparsemem.indexes.base import check_ids
from sparsemem.indexes.factory import PRODUCT_KEY

INT64_MAX = 2**63 - 1
MAX_TTL = 2**62  # the clock and it fit into an int64 together


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype that rows can have."""
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, ROW_DTYPES))}")
    return dtype


def check_bank_queries(queries: Tensor, width: int, device: torch.device) -> None:
    """Refuse queries that are not [..., width] finite numbers on the bank's device."""
    _check_tensor("queries", queries)
    if not queries.ndim or queries.shape[-1] != width:
        raise ValueError(f"queries has shape {list(queries.shape)}, expected [..., {width}]")
    _check_floats("queries", queries, device)


def check_bank_ids(ids: Tensor, num_rows: int, device: torch.device) -> None:
    """Refuse ids that are not distinct row numbers [n] on the bank's device."""
    _check_tensor("ids", ids)
    check_ids(ids, num_rows)
    _check_device("ids", ids, device)


def check_table(name: str, rows: Tensor, count: int | None, width: int, like: Tensor) -> Tensor:
    """Rows [count, width] as a table of the dtype and device of `like` holds them."""
    _check_tensor(name, rows)
    if rows.ndim != 2 or rows.shape[1] != width or count not in (None, len(rows)):
        wanted = f"[{'n' if count is None else count}, {width}]"
        raise ValueError(f"{name} has shape {list(rows.shape)}, expected {wanted}")
    _check_floats(name, rows, like.device)
    stored = rows.detach().to(like.dtype)
    if stored.dtype != rows.dtype and not stored.isfinite().all():
        limit = torch.finfo(like.dtype).max
        raise ValueError(
            f"{name} holds {rows.abs().max().item():g}, expected at most {limit:g} in {like.dtype}"
        )
    return stored


def check_tags(tags: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Tags [count] of one tag for all, or of one a row."""
    if not isinstance(tags, Tensor):
        check_at_most("tags", check_size("tags", tags, 0), "the largest int64", INT64_MAX)
        return torch.full((count,), tags, device=device)
    if tags.dtype != torch.int64 or tags.shape != (count,):
        raise ValueError(f"tags is {tags.dtype} {list(tags.shape)}, expected int64 [{count}]")
    _check_device("tags", tags, device)
    if len(tags) and int(tags.min()) < 0:
        raise ValueError(f"tags holds {int(tags.min())}, expected at least 0")
    return tags


def check_ttl(ttl: int | None) -> int:
    """A time to live in calls; 0: forever."""
    if ttl is None:
        return 0
    return check_at_most("ttl", check_size("ttl", ttl, 0), "the longest", MAX_TTL)


def check_index(index: str, min_recall: float | None, value_width: int | None) -> None:
    """Refuse what cannot be an index's name, its floor of the recall, and keys without values."""
    if min_recall is not None:
        check_fraction("min_recall", min_recall)
    if not isinstance(index, str):
        raise TypeError(
            f"index is {index!r}, expected 'exact', 'product-key' or a FAISS factory string"
        )
    if index == PRODUCT_KEY and value_width is None:
        raise ValueError("value_width is None, expected a width: product keys are no values")


def check_live(ids: Tensor, live: Tensor, what: str) -> None:
    """Refuse ids of rows that are not live, as `what` needs them to be."""
    missing = ids[~live.index_select(0, ids)]
    if len(missing):
        raise ValueError(f"ids holds {int(missing[0])}, which is not live: {what}")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a Tensor")


def _check_floats(name: str, tensor: Tensor, device: torch.device) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} is {tensor.dtype}, expected a floating dtype")
    _check_device(name, tensor, device)
    check_finite(name, tensor)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}, where the bank is")
