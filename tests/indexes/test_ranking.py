import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.indexes.ranking import GRID_BITS, POSITION_BITS, on_grid, top_k

grids = st.lists(st.integers(-4, 4), min_size=1, max_size=40)


@given(grids, st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_order_is_score_then_position(cells, data, dtype):
    k = data.draw(st.integers(1, len(cells)))
    scores = torch.tensor(cells, dtype=dtype) / 4
    expected = sorted(range(len(cells)), key=lambda i: (-cells[i], i))[:k]
    assert top_k(scores, k).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_noise_ties_and_a_grid_step_does_not(dtype):
    step = 2.0 ** -GRID_BITS[dtype]
    noise = torch.tensor([0.5, 0.5 + step / 8, 0.5 + 2 * step], dtype=dtype)
    assert top_k(noise, 3).tolist() == [2, 0, 1]


def test_colinear_rows_tie_whatever_their_length():
    torch.manual_seed(1)
    row, query = torch.randn(32), torch.randn(32)
    rows = row * torch.linspace(0.5, 7, 50).unsqueeze(1)
    scores = rows @ query / rows.norm(dim=1) / query.norm()
    assert scores.unique().numel() > 1, "the kernel's noise is what the grid is for"
    assert top_k(scores, 5).tolist() == [0, 1, 2, 3, 4]


def test_batched_and_minus_infinity_last():
    scores = torch.tensor([[0.1, -torch.inf, 0.9], [-torch.inf, -1.0, -torch.inf]])
    assert top_k(scores, 2).tolist() == [[2, 0], [1, 0]]


def test_the_penalty_of_the_last_position_stays_below_a_grid_step():
    assert (2**POSITION_BITS - 1) * 2.0**-POSITION_BITS < 1
    # One double holds both parts: 1.0 on the finest grid, and the smallest penalty.
    largest = on_grid(torch.ones(1, dtype=torch.float64))
    assert largest - 2.0**-POSITION_BITS < largest


def test_too_many_positions_are_refused(plain_errors):
    scores = torch.zeros(1).expand(2**POSITION_BITS + 1)
    with pytest.raises(ValueError, match=r"scores has 4194305 positions, expected at most 4194304"):
        top_k(scores, 1)
