import math

import pytest
import torch

from sparsemem.tasks import NGramsTask


def brute_force(bits, n):
    """P(next bit = 1) after each step t >= n - 2: equation 10, by looking through the past."""
    chances = {}
    for step in range(n - 2, len(bits)):
        context = bits[step - n + 2 : step + 1]
        seen = [
            bits[place + n - 1]
            for place in range(step - n + 2)
            if bits[place : place + n - 1] == context
        ]
        chances[step] = (sum(seen) + 0.5) / (len(seen) + 1)
    return chances


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("values", ["01", "±1"])
def test_optimal_output_by_brute_force(n, values):
    task = NGramsTask(n=n, batch_size=5, input_values=values, dtype="float64")
    batch = task.batch(0, 80)
    logits = task.optimal_output(batch)
    loss, wrong = 0.0, 0
    for row in range(5):
        bits = (batch.input[row, :, 0] > 0).int().tolist()
        chances = brute_force(bits, n)
        assert [t for t, on in enumerate(batch.mask[row].tolist()) if on] == list(chances)
        for step, chance in chances.items():
            assert logits[row, step, 0].sigmoid().item() == pytest.approx(chance, abs=1e-12)
            truth = batch.target[row, step, 0].item()
            loss -= math.log(chance if truth else 1 - chance)
            wrong += (chance > 0.5) != truth
    assert task.loss(logits, batch).item() == pytest.approx(loss / batch.mask.sum().item())
    assert task.metric(logits, batch).item() == pytest.approx(wrong / 5)


def test_target_is_the_next_bit():
    batch = NGramsTask(n=4, batch_size=6, input_values="01").batch(2, 30)
    assert batch.input.shape == (6, 29, 1)
    assert torch.equal(batch.target[:, :-1], batch.input[:, 1:])
    assert batch.mask.tolist() == [[False] * 2 + [True] * 27] * 6


def test_the_optimal_predictor_is_calibrated():
    # True only if the tables are drawn from Beta(1/2, 1/2): from a uniform one, for
    # instance, a bit seen once after a context would come again in 2/3 of the cases, not 3/4.
    task = NGramsTask(n=3, batch_size=4000)
    batch = task.batch(0, 30)
    chances = task.optimal_output(batch).sigmoid()[batch.mask].flatten()
    truths = batch.target[batch.mask].flatten()
    groups = [
        (value.item(), truths[chances == value].mean().item())
        for value, number in zip(*chances.unique(return_counts=True), strict=True)
        if number > 2000
    ]
    assert len(groups) > 10
    assert all(abs(frequency - chance) < 0.04 for chance, frequency in groups)


def test_first_bits_are_fair():
    batch = NGramsTask(n=6, batch_size=4000, input_values="01").batch(0, 6)
    assert (batch.input[:, :5].mean((0, 2)) - 0.5).abs().max() < 0.03


def test_the_optimal_predictor_beats_every_constant():
    task = NGramsTask(batch_size=32)
    batch = task.batch(0)
    best = task.loss(task.optimal_output(batch), batch)
    constant = batch.target[batch.mask].mean().logit()
    assert best < task.loss(torch.full_like(batch.target, constant), batch) - 0.05


def test_levels_start_where_there_is_something_to_predict(plain_errors):
    task = NGramsTask(n=4)
    assert (task.min_level, task.max_level) == (4, 200)
    assert task.batch(0, 4).mask.sum(1).tolist() == [1] * 16
    with pytest.raises(ValueError, match="level is 3, expected at least 4"):
        task.batch(0, 3)
    with pytest.raises(ValueError, match="n is 1, expected at least 2"):
        NGramsTask(n=1)
    with pytest.raises(ValueError, match="n is 40, expected at most the largest n = 16"):
        NGramsTask(n=40)
    with pytest.raises(ValueError, match="max_level is 5, expected at least 6"):
        NGramsTask(max_level=5)
