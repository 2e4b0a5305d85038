"""Long episodes: the index proposes, every write is seen."""

import sys

import pytest
import torch

from sparsemem.indexes import sealed as sealed_module
from sparsemem.memory.episode import Episode

pytest.importorskip("faiss")


def write_random(episode, generator, step, width=8):
    """A fresh slot, and two old ones (sealed or not) changed."""
    batch = episode.batch_size
    fresh = torch.full((batch, 1), step)
    old = torch.randint(0, step + 1, (batch, 1, 2), generator=generator)
    ids = torch.cat([old, fresh.unsqueeze(1)], -1)
    words = torch.randn(batch, 1, width, generator=generator)
    weights = torch.rand(batch, 1, 3, generator=generator)
    return episode.write(ids, weights, words, fresh), words


def grown_pair(steps, index_after, batch_size=2):
    """The same episode with an index and with exact scans."""
    pair = []
    for limit in (index_after, None):
        generator = torch.Generator().manual_seed(1)
        episode = Episode.start(batch_size, 2**40, 8, index_after=limit)
        for step in range(steps):
            episode, word = write_random(episode, generator, step)
            if limit:
                episode.search(word, 3)  # lets the index absorb as it grows
        pair.append(episode)
    return pair


def test_every_write_is_found_at_once_and_recall_is_high():
    generator = torch.Generator().manual_seed(1)
    episode = Episode.start(2, 2**40, 8, index_after=64)
    exact = Episode.start(2, 2**40, 8)
    hits = total = 0
    for step in range(700):
        again = torch.Generator().manual_seed(step)
        episode, word = write_random(episode, again, step)
        exact, _ = write_random(exact, torch.Generator().manual_seed(step), step)
        # The fresh row is a multiple of the word just written: nothing is nearer.
        assert (episode.search(word, 1) == exact.search(word, 1)).all()
        queries = torch.randn(2, 3, 8, generator=generator)
        found, truth = episode.search(queries, 4), exact.search(queries, 4)
        hits += int((found.unsqueeze(-1) == truth.unsqueeze(-2)).sum())
        total += truth.numel()
        assert found.sort(-1).values.diff().min() > 0, "no id twice"
    assert episode._store.sealed.sealed > 500
    assert hits / total > 0.97


def test_probing_all_lists_equals_the_exact_scan(monkeypatch):
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    episode, exact = grown_pair(400, 64)
    assert episode._store.sealed.sealed
    queries = torch.randn(2, 20, 8)
    assert torch.equal(episode.search(queries, 4), exact.search(queries, 4))


def test_a_clone_searches_alike(monkeypatch):
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    episode, exact = grown_pair(200, 64)
    queries = torch.randn(2, 20, 8)
    assert torch.equal(episode.clone().search(queries, 4), exact.search(queries, 4))


def test_a_full_memory_is_searched_whole(monkeypatch):
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    pair = []
    for limit in (16, None):
        episode = Episode.start(1, 40, 8, index_after=limit)
        for step in range(40):
            episode, _ = write_random(episode, torch.Generator().manual_seed(step), step)
            episode.search(torch.ones(1, 1, 8), 4)
        pair.append(episode)
    queries = torch.randn(1, 20, 8)
    assert torch.equal(pair[0].search(queries, 5), pair[1].search(queries, 5))


def test_without_faiss_scans_go_on_after_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    sealed_module.load_faiss.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"install FAISS \(sparsemem\[cpu\]"):
            episode, exact = grown_pair(100, 64)
        queries = torch.randn(2, 20, 8)
        assert torch.equal(episode.search(queries, 4), exact.search(queries, 4))
    finally:
        sealed_module.load_faiss.cache_clear()
