import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.memory.candidates import Candidates, best_positions, joined_candidates, max_slots

SCORES = st.sampled_from([-1.0, -0.25, 0.0, 1e-12, 0.25, 0.25 + 1e-12, 1.0, 2.5])


@given(st.lists(st.tuples(SCORES, st.integers(-1, 2**31 - 1)), min_size=1, max_size=30), st.data())
def test_ranks_by_score_on_the_grid_then_by_slot(pairs, data):
    k = data.draw(st.integers(1, len(pairs)))
    scores = torch.tensor([[score for score, _ in pairs]], dtype=torch.float64)
    slots = torch.tensor([[slot for _, slot in pairs]])
    best = Candidates(slots, scores).best(k)
    ranked = sorted((slot < 0, -round(score * 2**28), slot) for score, slot in pairs)
    expected = [max(slot, -1) for _, _, slot in ranked[:k]]
    assert best.slots.tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_greatest_slot_does_not_spill_into_the_score(dtype):
    last = max_slots(dtype) - 1
    scores = torch.tensor([8.0, 8.0, -8.0, -8.0], dtype=dtype)
    slots = torch.tensor([last, 0, 0, last])
    assert best_positions(scores, slots, 4).tolist() == [1, 0, 2, 3]


def test_scores_that_are_no_numbers_or_beyond_the_range_still_rank():
    scores = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert best_positions(scores, torch.arange(4), 4).tolist() == [1, 3, 0, 2]


def test_fewer_candidates_than_k_are_all_returned():
    first = Candidates(torch.tensor([[4]]), torch.tensor([[0.5]]))
    second = Candidates(torch.tensor([[-1]]), torch.tensor([[0.9]]))
    best = joined_candidates(first, second).best(5)
    assert best.slots.tolist() == [[4, -1]]
