"""Generated tasks on binary words: what they share, and their wrong bits.

Shape letters: B batch, T steps, X input size, Y output size, L items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from sparsemem.checks import check_at_most
from sparsemem.tasks.base import SPLITS, Batch, Task, check_choice

INPUT_VALUES = ("±1", "01")


class BitTask(Task):
    """A task whose target is bits: binary cross-entropy on logits, wrong bits a sequence.

    The sequences of a batch have one length; `level` is the number of items. Training
    draws levels from `min_level` to `max_level`; harder ones can be asked for too.
    """

    metric_name = "wrong bits"

    def __init__(
        self,
        *,
        min_level: int | None = None,
        max_level: int = 10,
        input_values: str = "±1",
        **common: Any,
    ) -> None:
        """Keep the range of levels (from the lowest there is), and how a bit is shown.

        `input_values`: "±1" shows the bits 0 and 1 as -1 and +1, so that a shown bit
        differs from the silence (0) around it; "01" shows them as they are.
        """
        super().__init__(**common)
        self.max_level = self.check_level(max_level, "max_level")
        least = self.lowest_level if min_level is None else min_level
        self.check_level(least, "min_level")
        self.min_level = check_at_most("min_level", least, "max_level", max_level)
        self.level = max_level
        self.input_values = check_choice("input_values", input_values, INPUT_VALUES)

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """Draw a batch of sequences of `level` items."""
        raise NotImplementedError

    def make_batch(self, index: int, level: int) -> Batch:
        """Batch number `index`: all randomness comes from (seed, split, level, index)."""
        key = [self.seed, SPLITS.index(self.split), level, index]
        return self.generate(np.random.default_rng(key), level)

    def normaliser(self, batch: Batch) -> Int[Tensor, ""]:
        """The number of bits that count."""
        return batch.mask.sum() * self.output_size

    def summed_loss(self, output: Float[Tensor, "B T Y"], batch: Batch) -> Float[Tensor, ""]:
        """Binary cross-entropy of the logits `output`, in nats, summed over the bits that count."""
        target = batch.target[batch.mask].to(output.dtype)
        return binary_cross_entropy_with_logits(output[batch.mask], target, reduction="sum")

    def score(
        self, output: Float[Tensor, "B T Y"], batch: Batch
    ) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
        """(wrong bits, sequences): a bit is wrong if its logit is on the wrong side of 0."""
        wrong = ((output > 0) != (batch.target > 0.5))[batch.mask].sum()
        return wrong, wrong.new_tensor(len(output))

    # For subclasses ------------------------------------------------------------------

    def random_bits(self, rng: np.random.Generator, *shape: int) -> Float[Tensor, "B ..."]:
        """Fair random bits [batch_size, *shape] in {0, 1}."""
        bits = rng.integers(2, size=(self.batch_size, *shape), dtype=np.uint8)
        return torch.from_numpy(bits).to(self.dtype)

    def shown(self, bits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Bits in {0, 1} as the network sees them."""
        return bits if self.input_values == "01" else 2 * bits - 1

    def silence(self, steps: int) -> Batch:
        """A batch of `steps` steps in which nothing is shown and nothing counts."""
        input = torch.zeros(self.batch_size, steps, self.input_size, dtype=self.dtype)
        target = torch.zeros(self.batch_size, steps, self.output_size, dtype=self.dtype)
        mask = torch.zeros(self.batch_size, steps, dtype=torch.bool)
        return Batch(input, target, mask)
