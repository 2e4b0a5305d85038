"""The links against dense matrices, in memories small enough that rows overflow their L links."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.memory.entries import Entries, totals
from sparsemem.memory.links import TemporalLinks, largest, scattered
from tests.oracles.dense_sam import best, keep_largest

SLOTS = 6


def dense(ids, weights):
    return scattered(Entries(ids, weights), SLOTS)


def table(entries):
    """A table [1, 1, SLOTS, L] as a dense matrix."""
    return scattered(Entries(entries.ids[:, 0], entries.weights[:, 0]), SLOTS)[0]


entry = st.tuples(st.integers(0, SLOTS - 1), st.sampled_from([0.0, 0.1, 0.25, 0.05]))
steps = st.lists(st.lists(entry, min_size=3, max_size=3), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(steps, st.integers(1, 3), st.none() | st.permutations(range(SLOTS)))
def test_equal_the_dense_equations(history, num_links, slots):
    """Also where positions are not slots: position i stands for slots[i], and ties go by slot."""
    links = TemporalLinks.start(1, 1, num_links, torch.empty(0, dtype=torch.float64))
    links.reserve(SLOTS)
    slot_table = slots if slots is None else torch.tensor([slots])
    of = torch.arange(SLOTS) if slots is None else torch.tensor(slots)
    n, p = torch.zeros(2, SLOTS, SLOTS, dtype=torch.float64)
    precedence = torch.zeros(SLOTS, dtype=torch.float64)
    for step in history:
        ids = torch.tensor([[[slot for slot, _ in step]]])
        weights = torch.tensor([[[weight for _, weight in step]]], dtype=torch.float64)
        w = dense(ids, weights)[0, 0]
        links.update(Entries(of.argsort()[ids], weights), SLOTS, slot_table)
        n = keep_largest((1 - w)[:, None] * n + w[:, None] * precedence[None], num_links)
        p = keep_largest((1 - w)[None] * p + w[None] * precedence[:, None], num_links)
        precedence = keep_largest((1 - w.sum()) * precedence + w, num_links)
        torch.testing.assert_close(table(links.follows), n[of][:, of], rtol=0, atol=1e-14)
        torch.testing.assert_close(table(links.precedes), p[of][:, of], rtol=0, atol=1e-14)
        torch.testing.assert_close(
            scattered(links.precedence, SLOTS)[0, 0], precedence[of], rtol=0, atol=1e-14
        )
        check_follow(links, links.follows, n, slot_table, of)
        check_follow(links, links.precedes, p, slot_table, of)


def check_follow(links, links_table, matrix, slot_table, of):
    weights = torch.tensor([[[0.5, 0.25, 0.125]]], dtype=torch.float64)
    slots = torch.tensor([[[4, 1, 4]]])
    read = Entries(of.argsort()[slots], weights)
    found = links.follow(links_table, read, 2, SLOTS, slot_table)
    followed = (found.weights_of @ read.weights.unsqueeze(-1)).squeeze(-1)
    expected = keep_largest(matrix @ dense(slots, weights)[0, 0], 2)
    torch.testing.assert_close(dense(of[found.ids], followed)[0, 0], expected, rtol=0, atol=1e-14)


def test_forward_and_backward_walk_the_order_of_writing():
    """Slots 3, 0, 5 written one after the other, fully: forward from 0 is 5, backward is 3."""
    links = TemporalLinks.start(1, 1, 8, torch.empty(0))
    links.reserve(SLOTS)
    for slot in (3, 0, 5):
        links.update(Entries(torch.tensor([[[slot]]]), torch.ones(1, 1, 1)), SLOTS)
    read = Entries(torch.tensor([[[0]]]), torch.ones(1, 1, 1))
    for links_table, expected in ((links.follows, 5), (links.precedes, 3)):
        found = links.follow(links_table, read, 1, SLOTS)
        assert found.ids.tolist() == [[[expected]]]
        assert found.weights_of.tolist() == [[[[1.0]]]]


def test_growing_keeps_the_links():
    links = TemporalLinks.start(1, 1, 2, torch.empty(0))
    links.reserve(2)
    for slot in (0, 1):
        links.update(Entries(torch.tensor([[[slot]]]), torch.ones(1, 1, 1)), 2)
    links.reserve(6)
    read = Entries(torch.tensor([[[0]]]), torch.ones(1, 1, 1))
    assert links.follow(links.follows, read, 1, 6).ids.tolist() == [[[1]]]


def test_largest_adds_up_repeated_ids_and_breaks_ties_by_id():
    entries = Entries(torch.tensor([4, 2, 4, 0, 3]), torch.tensor([0.25, 0.25, 0.25, 0.25, 0.25]))
    kept = largest(entries, 3)
    assert kept.ids.tolist() == [4, 0, 2]
    assert kept.weights.tolist() == [0.5, 0.25, 0.25]
    assert totals(entries).tolist() == [0.5, 0.25, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_link_comes_before_no_link(dtype):
    kept = largest(Entries(torch.tensor([0, 5]), torch.tensor([0.0, 1e-12], dtype=dtype)), 1)
    assert kept.ids.tolist() == [5]
    assert best(torch.tensor([0.0, 1e-12], dtype=dtype), 1).tolist() == [0]
