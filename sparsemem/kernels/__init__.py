"""Fused steps of the sparse memories, compiled; the torch code beside them is the reference."""
