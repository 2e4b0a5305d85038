import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.tasks import FactsTask, make_task

WORD = 2**64


def plain_key(number, bits, constants):
    """A key's code, in Python's numbers, which do not overflow."""
    half = (bits + 1) // 2
    for constant in constants:
        number = (number * (constant | 1) + (constant >> half)) % 2**bits
        number ^= number >> half
    return number


def plain_word(counter, seed):
    """SplitMix64, as in Steele et al. 2014."""
    mixed = (counter * 0x9E3779B97F4A7C15 + seed) % WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % WORD
    return mixed ^ (mixed >> 31)


def code(bits):
    return sum(int(bit) << place for place, bit in enumerate(bits))


@given(bits=st.integers(1, 62), value_bits=st.integers(1, 130), seed=st.integers(0, 2**70))
def test_facts_are_those_of_plain_arithmetic(bits, value_bits, seed):
    task = FactsTask(num_facts=2, key_bits=bits, value_bits=value_bits, map_seed=seed)
    constants = [int(constant) for constant in task._constants]
    numbers = [0, 1, 2**bits // 3, 2**bits - 1]
    keys, values = task.keys(np.array(numbers)), task.values(np.array(numbers))
    assert keys.shape == (4, bits)
    assert values.shape == (4, value_bits)
    words = -(-value_bits // 64)
    for number, key, value in zip(numbers, keys, values, strict=True):
        assert code(key) == plain_key(number, bits, constants[:-1])
        drawn = [plain_word(number * words + word, constants[-1]) for word in range(words)]
        whole = sum(word << (64 * place) for place, word in enumerate(drawn))
        assert code(value) == whole % 2**value_bits


@given(bits=st.integers(1, 12), seed=st.integers(0, 1000))
def test_no_two_keys_are_alike(bits, seed):
    task = FactsTask(num_facts=1, key_bits=bits, map_seed=seed)
    keys = task.keys(np.arange(2**bits))
    assert len({code(key) for key in keys}) == 2**bits


def test_bits_are_fair_and_keys_in_no_order():
    task = FactsTask(num_facts=2**12, key_bits=20, value_bits=16)
    keys, values = task.keys(np.arange(2**12)), task.values(np.arange(2**12))
    # 5 standard deviations of the mean of 4,096 fair bits
    assert np.abs(keys.mean(0) - 0.5).max() < 5 * 0.5 / 64
    assert np.abs(values.mean(0) - 0.5).max() < 5 * 0.5 / 64
    both = np.concatenate([keys, values], 1).astype(float)
    correlations = np.corrcoef(both.T) - np.eye(36)
    assert np.abs(correlations).max() < 5 / 64
    assert np.abs((keys[1:] != keys[:-1]).mean() - 0.5) < 0.02


def test_a_batch_asks_facts_below_the_level():
    task = FactsTask(num_facts=50, key_bits=9, value_bits=5, queries=7, batch_size=40)
    batch = task.batch(3, 4)
    assert batch.input.shape == (40, 7, 9)
    assert batch.target.shape == (40, 7, 5)
    assert batch.mask.all()
    known = {code(key): value for key, value in zip(*map_of(task, 4), strict=True)}
    asked = set()
    for key, value in zip(batch.input.flatten(0, 1), batch.target.flatten(0, 1), strict=True):
        assert set(key.tolist()) <= {-1.0, 1.0}
        asked.add(code(key > 0))
        assert value.tolist() == known[code(key > 0)].tolist()
    assert asked == known.keys()


def map_of(task, count):
    return task.keys(np.arange(count)), task.values(np.arange(count))


def test_splits_ask_the_same_facts_in_other_orders():
    task = FactsTask(num_facts=8, batch_size=16)
    train, test = task.batch(0), task.with_split("test").batch(0)
    assert not torch.equal(train.input, test.input)
    facts = [
        {(*x.tolist(), *y.tolist()) for x, y in zip(*map_steps(batch), strict=True)}
        for batch in (train, test)
    ]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 8
    other = FactsTask(num_facts=8, batch_size=16, seed=5)
    assert not torch.equal(other.batch(0).input, train.input)
    assert other.identity == task.identity != FactsTask(num_facts=8, map_seed=1).identity


def map_steps(batch):
    return batch.input.flatten(0, 1), batch.target.flatten(0, 1)


def test_levels_and_sizes():
    task = make_task("facts", num_facts=30, key_bits=5)
    assert (task.min_level, task.max_level, task.level) == (1, 30, 30)
    assert FactsTask(num_facts=30, min_level=30).min_level == 30
    for options, message in (
        ({"num_facts": 33, "key_bits": 5}, "num_facts is 33, expected at most 2 ** key_bits = 32"),
        ({"key_bits": 63}, "key_bits is 63, expected at most the longest = 62"),
        ({"num_facts": 9, "max_level": 10}, "max_level is 10, expected at most num_facts = 9"),
        ({"map_seed": -1}, "map_seed is -1, expected at least 0"),
        ({"queries": 0}, "queries is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            FactsTask(**options)
    with pytest.raises(ValueError, match="level is 31, expected at most num_facts = 30"):
        task.batch(0, 31)
