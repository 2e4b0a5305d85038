"""Optimiser state as it is saved: only the rows that have any."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROWS = "rows"  # name of the ids beside packed state
CHUNK = 1 << 20  # rows looked at at once


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State without its zero rows, which `rows` then numbers; as it is if it is half full.

    A table of 10^8 rows of which few were ever trained takes little room in a checkpoint.
    """
    sizes = {len(value) if value.ndim else 0 for value in state.values()}
    if len(sizes) != 1 or 0 in sizes:
        return dict(state)
    marks = torch.stack([_any(value) for value in state.values()])
    ids = marks.any(0).nonzero().squeeze(1)
    if 2 * len(ids) > sizes.pop():
        return dict(state)
    return {ROWS: ids} | {name: value.index_select(0, ids) for name, value in state.items()}


def unpack(saved: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Fill all-zero `state` with what `pack` made; False, and nothing done, if it does not fit."""
    values = {name: value for name, value in saved.items() if name != ROWS}
    ids = saved.get(ROWS)
    if values.keys() != state.keys():
        return False
    for name, value in values.items():
        shape = tuple(state[name].shape)
        if ids is not None:
            if not shape or (len(ids) and not 0 <= ids.min() <= ids.max() < shape[0]):
                return False
            shape = (len(ids), *shape[1:])
        if tuple(value.shape) != shape:
            return False
    for name, value in values.items():
        into = state[name]
        if ids is None:
            into.copy_(value)
        else:
            into.index_copy_(0, ids.to(into.device), value.to(into))
    return True


def _any(table: Tensor) -> Tensor:
    """Which rows hold anything but zero."""
    parts = torch.split(table, CHUNK)
    return torch.cat([part.ne(0).reshape(len(part), -1).any(1) for part in parts])
