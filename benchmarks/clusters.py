"""Clustered rows, as learned embeddings are: what the benchmarks of banks search."""

from sparsemem.bench.points import clustered

__all__ = ["clustered"]
