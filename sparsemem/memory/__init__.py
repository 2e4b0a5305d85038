"""Memories: episodes that record what is touched, and dense ones."""
