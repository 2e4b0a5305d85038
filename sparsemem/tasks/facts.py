"""Facts: recall from long-term memory, of what a sequence does not show."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsemem.checks import check_at_most, check_size
from sparsemem.tasks.base import Batch
from sparsemem.tasks.bits import BitTask

LARGEST_KEY = 62  # bits of an int64 that a fact's number can have
WORD = 64  # bits of a value that are drawn at once
ROUNDS = 4
Codes = npt.NDArray[np.uint64]


class FactsTask(BitTask):
    """Ask `queries` facts, one a step: shown a key, the answer at the same step is its value.

    A fact is a key word of `key_bits` and a value word of `value_bits`, both random, and no two
    keys are alike. Which facts there are is given by `map_seed` alone, so that training, validation
    and test ask the same ones, in other orders: they have to be held in the weights, or in a bank.
    Fact i is computed from i, so that any number of facts costs nothing.

    The level is how many of the `num_facts` are asked for, the first ones.
    Input channels: `key_bits`. T = queries steps, all of which count.
    """

    def __init__(
        self,
        *,
        num_facts: int = 1024,
        key_bits: int = 20,
        value_bits: int = 16,
        queries: int = 16,
        map_seed: int = 0,
        max_level: int | None = None,
        **common: Any,
    ) -> None:
        self.key_bits = check_at_most(
            "key_bits", check_size("key_bits", key_bits), "the longest", LARGEST_KEY
        )
        self.value_bits = check_size("value_bits", value_bits)
        self.num_facts = check_at_most(
            "num_facts", check_size("num_facts", num_facts), "2 ** key_bits", 2**key_bits
        )
        self.queries = check_size("queries", queries)
        self.map_seed = check_size("map_seed", map_seed, 0)
        self.input_size, self.output_size = key_bits, value_bits
        seeds = np.random.SeedSequence([map_seed, key_bits, value_bits])
        self._constants = seeds.generate_state(ROUNDS + 1, np.uint64).astype(np.uint64)
        super().__init__(max_level=num_facts if max_level is None else max_level, **common)

    @property
    def identity(self) -> str:
        """Which facts there are."""
        return f"facts {self.map_seed} of {self.key_bits} and {self.value_bits} bits"

    def check_level(self, level: int, name: str = "level") -> int:
        """Return `level` if there are that many facts."""
        return check_at_most(name, super().check_level(level, name), "num_facts", self.num_facts)

    def keys(self, facts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Key bits [..., key_bits] of facts by number: a bijection of numbers below 2^key_bits."""
        codes = _permuted(facts.astype(np.uint64), self.key_bits, self._constants[:ROUNDS])
        return _bits(codes, self.key_bits)

    def values(self, facts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Value bits [..., value_bits] of facts by number."""
        words = -(-self.value_bits // WORD)
        counters: Codes = facts.astype(np.uint64)[..., None] * np.uint64(words)
        drawn = _drawn(counters + np.arange(words).astype(np.uint64), self._constants[ROUNDS])
        bits = _bits(drawn, WORD)
        return bits.reshape(*facts.shape, words * WORD)[..., : self.value_bits]

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """Facts asked at random."""
        facts = rng.integers(level, size=(self.batch_size, self.queries))
        keys = torch.from_numpy(self.keys(facts)).to(self.dtype)
        values = torch.from_numpy(self.values(facts)).to(self.dtype)
        return Batch(self.shown(keys), values, torch.ones(facts.shape, dtype=torch.bool))


def _permuted(codes: Codes, bits: int, constants: Codes) -> Codes:
    """A permutation of the numbers below 2^bits: rounds of an odd product and a shift, each of
    which can be undone.
    """
    mask, half = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)
    for constant in constants:
        codes = (codes * (constant | np.uint64(1)) + (constant >> half)) & mask
        codes = codes ^ (codes >> half)
    return codes


def _drawn(counters: Codes, seed: np.uint64) -> Codes:
    """Random words by number: SplitMix64 (Steele et al. 2014), of which any can be had at once."""
    mixed = counters * np.uint64(0x9E3779B97F4A7C15) + seed
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _bits(codes: Codes, count: int) -> npt.NDArray[np.uint8]:
    """The lowest bits [..., count] of numbers."""
    bits = (codes[..., None] >> np.arange(count, dtype=np.uint64)) & np.uint64(1)
    return bits.astype(np.uint8)
