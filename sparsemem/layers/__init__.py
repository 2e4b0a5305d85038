"""Layers for other people's networks."""

from sparsemem.layers.memory_layer import MemoryLayer

__all__ = ["MemoryLayer"]
