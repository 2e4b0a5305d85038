"""Layers for other people's networks."""
