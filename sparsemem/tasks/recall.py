"""Associative recall (Graves et al. 2014, section 4.3; Rae et al. 2016, section 4.2).

Shape letters: B batch, L items, D words an item, V bits a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.checks import check_at_most, check_size
from sparsemem.tasks.base import Batch, check_choice
from sparsemem.tasks.bits import BitTask

VARIANTS = ("next-item", "key-value")
LARGEST_CODE = 62  # bits of an int64 that can be drawn from without replacement


class AssociativeRecallTask(BitTask):
    """Show `level` items, then a query; the answer is what was shown with, or after, it.

    `variant="next-item"` (NTM paper): an item is `item_length` words behind an item
    delimiter. The query is one of the first level - 1 items between two query
    delimiters; the answer is the item that followed it. Levels start at 2.
    Input channels: `bits`, item delimiter, query delimiter.

    `variant="key-value"` (SAM paper): key and value are shown side by side, a word of
    each a step. The query is a key, beside the query flag; the answer, from the next
    step on, is its value. Input channels: `bits` of the key, `bits` of the value, flag.

    The items (keys) of a sequence all differ, so that there is one answer. `num_queries`
    asks that many independent queries one after the other, each with its answer.
    `item_length` is 3 (next-item, as in the paper) or 1 (key-value) by default.
    """

    def __init__(
        self,
        *,
        variant: str = "next-item",
        bits: int = 6,
        item_length: int | None = None,
        num_queries: int = 1,
        max_level: int = 6,
        **common: Any,
    ) -> None:
        self.variant = check_choice("variant", variant, VARIANTS)
        self.bits = check_size("bits", bits)
        pairs = variant == "key-value"
        default_length = 1 if pairs else 3
        self.item_length = check_size(
            "item_length", default_length if item_length is None else item_length
        )
        self.num_queries = check_size("num_queries", num_queries)
        self.lowest_level = 1 if pairs else 2
        self.input_size, self.output_size = (2 * bits + 1 if pairs else bits + 2), bits
        super().__init__(max_level=max_level, **common)

    def check_level(self, level: int, name: str = "level") -> int:
        """Return `level` if there are that many different items."""
        super().check_level(level, name)
        different = 2 ** (self.bits * self.item_length)
        return check_at_most(name, level, "the number of different items", different)

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """All items, then the queries with their answers."""
        items = self._different_items(rng, level)
        if self.variant == "key-value":
            return self._key_value(rng, items)
        return self._next_item(rng, items)

    def _different_items(self, rng: np.random.Generator, level: int) -> Float[Tensor, "B L D V"]:
        """Items in {0, 1}, all different within a sequence."""
        width = self.bits * self.item_length
        # Wider items differ in their first 62 bits already; the others are free.
        code_width = min(width, LARGEST_CODE)
        codes = np.stack(
            [rng.choice(2**code_width, level, replace=False) for _ in range(self.batch_size)]
        )
        coded = (codes[..., None] >> np.arange(code_width)) & 1
        free = rng.integers(2, size=(self.batch_size, level, width - code_width))
        words = np.concatenate([coded, free], 2).reshape(
            self.batch_size, level, self.item_length, self.bits
        )
        return torch.from_numpy(words).to(self.dtype)

    def _picks(self, rng: np.random.Generator, choices: int) -> list[tuple[Tensor, Tensor]]:
        """For each query, an index [B, 1] picking one item a sequence."""
        picks = torch.from_numpy(rng.integers(choices, size=(self.num_queries, self.batch_size)))
        rows = torch.arange(self.batch_size)
        return [(rows, pick) for pick in picks]

    def _next_item(self, rng: np.random.Generator, items: Float[Tensor, "B L D V"]) -> Batch:
        level, length, bits = items.shape[1], self.item_length, self.bits
        batch = self.silence(level * (length + 1) + self.num_queries * (2 * length + 2))
        for number in range(level):
            start = number * (length + 1)
            batch.input[:, start, bits] = 1
            batch.input[:, start + 1 : start + 1 + length, :bits] = self.shown(items[:, number])
        start = level * (length + 1)
        for rows, pick in self._picks(rng, level - 1):
            answer = start + length + 2
            batch.input[:, start, bits + 1] = batch.input[:, answer - 1, bits + 1] = 1
            batch.input[:, start + 1 : answer - 1, :bits] = self.shown(items[rows, pick])
            batch.target[:, answer : answer + length] = items[rows, pick + 1]
            batch.mask[:, answer : answer + length] = True
            start = answer + length
        return batch

    def _key_value(self, rng: np.random.Generator, keys: Float[Tensor, "B L D V"]) -> Batch:
        level, length, bits = keys.shape[1], self.item_length, self.bits
        values = self.random_bits(rng, level, length, bits)
        batch = self.silence((level + 2 * self.num_queries) * length)
        pairs = torch.cat([keys, values], 3).flatten(1, 2)
        batch.input[:, : level * length, : 2 * bits] = self.shown(pairs)
        start = level * length
        for rows, pick in self._picks(rng, level):
            answer = start + length
            batch.input[:, start:answer, :bits] = self.shown(keys[rows, pick])
            batch.input[:, start:answer, 2 * bits] = 1
            batch.target[:, answer : answer + length] = values[rows, pick]
            batch.mask[:, answer : answer + length] = True
            start = answer + length
        return batch
