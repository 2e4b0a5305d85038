"""Layers for other people's networks."""

from sparsemem.layers.lifelong import LifelongMemory, Recall, margin_loss, neighbour_loss
from sparsemem.layers.memory_layer import MemoryLayer

__all__ = ["LifelongMemory", "MemoryLayer", "Recall", "margin_loss", "neighbour_loss"]
