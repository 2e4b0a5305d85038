"""Nearest-row search: ranking rules and indices. Knows nothing of models."""

if __name__ != "sparsemem.indexes":
    raise ImportError(f"import this package as sparsemem.indexes, not as {__name__}")
