"""How time and space grow with memory size: `sparsemem bench`."""
