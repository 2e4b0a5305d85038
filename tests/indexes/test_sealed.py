"""Long episodes: the index proposes, every write is seen."""

import sys

import pytest
import torch

from sparsemem.indexes import sealed as sealed_module
from sparsemem.memory.episode import Episode
from sparsemem.models.sam import SAM
from sparsemem.models.sdnc import SDNC

pytest.importorskip("faiss")


@pytest.fixture(autouse=True)
def _short_tails(monkeypatch):
    monkeypatch.setattr(sealed_module, "TAIL", 16)


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


def test_episodes_of_uneven_progress(monkeypatch):
    """Rows that only one episode has touched stay in the tail of both."""
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    pair = []
    for limit in (16, None):
        generator = torch.Generator().manual_seed(1)
        episode = Episode.start(2, 2**40, 8, index_after=limit)
        for step in range(300):
            slots = torch.tensor([[step], [step // 10]])
            word = torch.randn(2, 1, 8, generator=generator)
            episode = episode.write(slots.unsqueeze(2), torch.ones(2, 1, 1), word, slots)
            episode.search(word, 3)
        pair.append(episode)
    assert 16 <= pair[0]._store.sealed.sealed <= 30
    queries = torch.randn(2, 20, 8)
    assert torch.equal(pair[0].search(queries, 6), pair[1].search(queries, 6))


def test_an_interrupted_absorb_is_taken_up_again(monkeypatch):
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    episode, exact = grown_pair(80, 64)
    store = episode._store
    for step in range(80, 100):
        for pair in (1, 0):
            generator = torch.Generator().manual_seed(step)
            if pair:
                episode, _ = write_random(episode, generator, step)
            else:
                exact, _ = write_random(exact, generator, step)
    calls = []

    def failing(rows, norms, which):
        calls.append(which)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(rows, norms, which)

    real = sealed_module.unit_rows
    queries = torch.randn(2, 20, 8)
    with monkeypatch.context() as patch:
        patch.setattr(sealed_module, "unit_rows", failing)
        with pytest.raises(KeyboardInterrupt):
            episode.search(queries, 4)
    assert torch.equal(episode.search(queries, 4), exact.search(queries, 4))
    assert [lists.ntotal for lists in store.sealed._lists] == [store.sealed.sealed] * 2


def test_lists_are_trained_anew_when_all_rows_have_changed():
    """A full memory grows no more, but its rows go on to move away from the centroids."""
    episode = Episode.start(1, 256, 8, index_after=64)
    generator = torch.Generator().manual_seed(0)
    trained = []
    for step in range(256 * (sealed_module.CHANGES + 2)):
        slot = torch.tensor([[step % 256]])
        centre = torch.zeros(8).index_fill_(0, torch.tensor([step // 256 % 8]), 5.0)
        word = (centre + torch.randn(8, generator=generator)).view(1, 1, 8)
        episode = episode.write(slot.unsqueeze(2), torch.ones(1, 1, 1), word, slot)
        episode.search(word, 1)
        trained.append(episode._store.sealed._lists[0])
    assert trained[255] is trained[300], "not at every change"
    assert trained[255] is not trained[-1]


@pytest.mark.parametrize("model_class", [SAM, SDNC])
def test_models_give_the_same_with_an_index_that_probes_everything(monkeypatch, model_class):
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    torch.manual_seed(2)
    options = {"num_slots": 2**40, "slot_dim": 8, "num_heads": 2, "top_k": 3}
    model = model_class(3, 10, 2, index_after=16, **options)
    exact = model_class(3, 10, 2, index_after=None, **options)
    exact.load_state_dict(model.state_dict())
    input, results = torch.randn(2, 60, 3), []
    for one in (model, exact):
        output, state = one(input)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in one.parameters())])
        assert (state.episode._store.sealed is not None) == (one is model)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


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
