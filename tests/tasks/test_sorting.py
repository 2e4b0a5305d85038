import pytest
import torch

from sparsemem.tasks import PrioritySortTask


@pytest.mark.parametrize("level", [1, 3, 20])
def test_highest_priorities_first(level):
    task = PrioritySortTask(bits=6, input_values="01", batch_size=12)
    batch = task.batch(0, level)
    count = {1: 1, 3: 2, 20: 16}[level]
    assert batch.input.shape == (12, level + 1 + count, 8)
    for row in range(12):
        pairs = [(step[6].item(), step[:6].tolist()) for step in batch.input[row, :level]]
        best = sorted(pairs, key=lambda pair: -pair[0])[:count]
        assert batch.target[row, level + 1 :].tolist() == [word for _, word in best]
    delimiter = torch.tensor([0.0] * 7 + [1.0])
    assert (batch.input[:, level] == delimiter).all()
    assert not batch.input[:, :level, 7].any()
    assert not batch.input[:, level + 1 :].any()
    assert batch.mask.tolist() == [[False] * (level + 1) + [True] * count] * 12


def test_priorities_fill_their_range():
    priorities = PrioritySortTask(batch_size=100).batch(0, 20).input[:, :20, 8]
    assert -1 <= priorities.min() < -0.99
    assert 0.99 < priorities.max() <= 1
    assert priorities.mean().abs() < 0.05


def test_equal_priorities_keep_their_order():
    # In bfloat16 200 priorities can hardly all differ.
    batch = PrioritySortTask(bits=12, fraction=1.0, batch_size=1, dtype="bfloat16").batch(0, 200)
    priorities = batch.input[0, :200, 12].tolist()
    assert len(set(priorities)) < 200
    order = sorted(range(200), key=lambda item: (-priorities[item], item))
    assert torch.equal(batch.target[0, 201:], (batch.input[0, order, :12] + 1) / 2)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), "half", True])
def test_bad_fraction(fraction, plain_errors):
    with pytest.raises(
        ValueError, match=f"fraction is {fraction!r}, expected a number from 0 to 1"
    ):
        PrioritySortTask(fraction=fraction)
