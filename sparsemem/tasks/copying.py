"""Copy and repeat copy (Graves et al. 2014, arXiv 1410.5401, sections 4.1 and 4.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsemem.checks import check_at_most, check_size
from sparsemem.tasks.base import Batch
from sparsemem.tasks.bits import BitTask

# The repeat count is shown with mean 0 and variance 1 over the paper's range of 1 to 10.
# Fixed, so that a count means the same when a model is evaluated on more repeats.
REPEATS_MEAN, REPEATS_VARIANCE = 5.5, 8.25


class CopyTask(BitTask):
    """Show `level` random words, then a delimiter; the words are to be given back in order.

    Input channels: `bits` of the word, the delimiter. T = 2 level + 1 steps.
    Sizes: 8 bits, 1-20 words in the NTM paper and in the SAM paper (arXiv 1610.09027).
    """

    def __init__(self, *, bits: int = 8, **common: Any) -> None:
        self.bits = check_size("bits", bits)
        self.input_size, self.output_size = bits + 1, bits
        super().__init__(**common)

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """Words, delimiter, answer."""
        words = self.random_bits(rng, level, self.bits)
        batch = self.silence(2 * level + 1)
        batch.input[:, :level, : self.bits] = self.shown(words)
        batch.input[:, level, self.bits] = 1
        batch.target[:, level + 1 :] = words
        batch.mask[:, level + 1 :] = True
        return batch


class RepeatCopyTask(BitTask):
    """Show `level` words and a repeat count; give the words back that often, then an end marker.

    Input channels: `bits` of the word, the delimiter, the normalised repeat count (shown
    with the delimiter). Output: `bits` and the end marker. The count is drawn once a
    batch from `min_repeats` to `max_repeats`. T = level (repeats + 1) + 2 steps.
    """

    def __init__(
        self, *, bits: int = 8, min_repeats: int = 1, max_repeats: int = 10, **common: Any
    ) -> None:
        self.bits = check_size("bits", bits)
        self.max_repeats = check_size("max_repeats", max_repeats)
        self.min_repeats = check_at_most(
            "min_repeats", check_size("min_repeats", min_repeats), "max_repeats", max_repeats
        )
        self.input_size, self.output_size = bits + 2, bits + 1
        super().__init__(**common)

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """Words, delimiter with count, answer, end marker."""
        repeats = int(rng.integers(self.min_repeats, self.max_repeats + 1))
        words = self.random_bits(rng, level, self.bits)
        batch = self.silence(level * (repeats + 1) + 2)
        batch.input[:, :level, : self.bits] = self.shown(words)
        batch.input[:, level, self.bits] = 1
        batch.input[:, level, self.bits + 1] = (repeats - REPEATS_MEAN) / REPEATS_VARIANCE**0.5
        batch.target[:, level + 1 : -1, : self.bits] = words.repeat(1, repeats, 1)
        batch.target[:, -1, self.bits] = 1
        batch.mask[:, level + 1 :] = True
        return batch
