import pytest
import torch

from sparsemem.tasks import CopyTask, RepeatCopyTask


def test_copy_target_is_the_shifted_input():
    batch = CopyTask(bits=5, input_values="01", batch_size=64).batch(3, 4)
    words, rest = batch.input[:, :4], batch.input[:, 4:]
    assert torch.equal(batch.target[:, 5:], words[..., :5])
    assert words[..., :5].unique().tolist() == [0, 1]
    assert not words[..., 5].any()
    assert rest.nonzero().tolist() == [[row, 0, 5] for row in range(64)]  # the delimiter
    assert batch.mask.tolist() == [[False] * 5 + [True] * 4] * 64


def test_signed_input_shows_the_same_bits():
    signed, plain = (
        CopyTask(bits=5, input_values=values, batch_size=8).batch(3, 4) for values in ("±1", "01")
    )
    assert torch.equal(signed.input[:, :4, :5], 2 * plain.input[:, :4, :5] - 1)
    assert torch.equal(signed.input[:, 4:], plain.input[:, 4:])  # silence stays 0
    assert torch.equal(signed.target, plain.target)


def test_bits_are_fair():
    batch = CopyTask(bits=8, batch_size=100).batch(0, 25)
    assert batch.target[batch.mask].mean().item() == pytest.approx(0.5, abs=0.02)


def test_items_beyond_the_training_levels():
    assert CopyTask(max_level=3).batch(0, 30).input.shape == (16, 61, 9)


@pytest.mark.parametrize("index", range(5))
def test_repeat_copy(index):
    task = RepeatCopyTask(bits=4, max_repeats=6, input_values="01", batch_size=7)
    batch = task.batch(index, 3)
    count = (batch.input[0, 3, 5] * 8.25**0.5 + 5.5).round().int().item()
    assert 1 <= count <= 6
    assert batch.input.shape == (7, 3 * (count + 1) + 2, 6)
    for repeat in range(count):
        start = 4 + 3 * repeat
        assert torch.equal(batch.target[:, start : start + 3, :4], batch.input[:, :3, :4])
    assert batch.target[..., 4].sum(1).tolist() == [1] * 7
    assert (batch.target[:, -1] == torch.tensor([0, 0, 0, 0, 1])).all()
    assert (batch.input[:, 3, 4] == 1).all()
    assert not batch.input[:, 4:].any()
    assert batch.mask.tolist() == [[False] * 4 + [True] * (3 * count + 1)] * 7


def test_repeat_counts_cover_their_range():
    task = RepeatCopyTask(bits=1, min_repeats=2, max_repeats=4, batch_size=1)
    lengths = {task.batch(index, 1).input.shape[1] for index in range(60)}
    assert lengths == {1 * (count + 1) + 2 for count in (2, 3, 4)}


def test_bad_repeats(plain_errors):
    with pytest.raises(ValueError, match="min_repeats is 3, expected at most max_repeats = 2"):
        RepeatCopyTask(min_repeats=3, max_repeats=2)
    with pytest.raises(ValueError, match="max_repeats is 0, expected at least 1"):
        RepeatCopyTask(max_repeats=0)
