"""Clustered rows, as learned embeddings are: what the benchmarks of banks search."""

import torch
from torch import Tensor

CLUSTERS, SPREAD = 2_000, 0.5


def clustered(count: int, width: int, seed: int = 0) -> Tensor:
    """Rows [count, width] of normal noise around 2,000 normal centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLUSTERS, width, generator=generator)
    rows = torch.randn(count, width, generator=generator).mul_(SPREAD)
    # In place and in parts: the benchmarks are to fit into memory.
    for start in range(0, count, 65_536):
        part = rows[start : start + 65_536]
        part += centres[torch.randint(CLUSTERS, (len(part),), generator=generator)]
    return rows
