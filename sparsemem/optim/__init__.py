"""Optimisers that step only the rows that a batch touched, and clipping that counts them."""
