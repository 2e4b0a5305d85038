"""Stochastic rounding to bfloat16."""

import torch

from sparsemem.optim.rounding import round_stochastically


def rounded(values, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return round_stochastically(values.expand(count, -1), generator).float()


def test_neighbours_in_proportion():
    # bfloat16 has 8 bits: above 1 the step is 2^-7.
    step = 2.0**-7
    values = torch.tensor([1 + step / 4, -(1 + step / 4), 1 + 0.9 * step, 1024 * (1 + step / 2)])
    many = rounded(values, 20_000)
    for column, low, high, share in (
        (0, 1.0, 1 + step, 0.25),
        (1, -1.0, -(1 + step), 0.25),
        (2, 1.0, 1 + step, 0.9),
        (3, 1024.0, 1024 * (1 + step), 0.5),
    ):
        assert set(many[:, column].tolist()) == {low, high}
        # 20,000 draws: the standard deviation of the share is at most 0.0036.
        assert abs((many[:, column] == high).float().mean().item() - share) < 0.018


def test_what_bfloat16_has_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, torch.inf, -torch.inf, 2.0**-130])
    exact = values.bfloat16().float()
    assert (rounded(exact, 200) == exact).all()


def test_depends_on_the_generator_alone():
    values = torch.randn(50)
    assert torch.equal(rounded(values, 3, seed=1), rounded(values, 3, seed=1))
    assert not torch.equal(rounded(values, 3, seed=1), rounded(values, 3, seed=2))
