"""Memory sharded over workers."""

if __name__ != "sparsemem.distributed":
    raise ImportError(f"import this package as sparsemem.distributed, not as {__name__}")
