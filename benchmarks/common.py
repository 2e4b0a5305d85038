"""What the benchmarks share, most of it from `sparsemem.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsemem.bench import measuring
from sparsemem.bench.measuring import Timings, interleaved, seconds

__all__ = ["Timings", "interleaved", "machine", "recalls", "seconds"]


def recalls(found: Any, truth: Any) -> list[float]:
    """Of each query, the share of the true ids [Q, K] that were found."""
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return [len(set(ours) & set(true)) / len(true) for ours, true in pairs]


def machine() -> dict[str, str]:
    """Where the figures come from."""
    return measuring.machine(Path(__file__).parent)
