"""Long episodes: trees propose, every write is seen."""

import random

import numpy as np
import pytest
import torch

from sparsemem.kernels import trees as tree_kernels
from sparsemem.memory import row_tree
from sparsemem.memory.episode import Episode
from sparsemem.memory.row_tree import NONE, RowTrees
from sparsemem.models.sam import SAM
from sparsemem.models.sdnc import SDNC

pytest.importorskip("numba")
F64 = torch.float64


@pytest.fixture(autouse=True)
def _small_nodes(monkeypatch):
    monkeypatch.setattr(row_tree, "NODE_SIZE", 16)


@pytest.fixture
def everywhere(monkeypatch):
    """Every list is looked into."""
    monkeypatch.setattr(row_tree, "PROBED_GROUPS", 1_000)
    monkeypatch.setattr(row_tree, "PROBED_LISTS", 1_000)


def check(trees):
    """Nodes and places agree; no node is too full, none is empty, none is lost."""
    t = trees.tables
    levels = [
        (t.row_members, t.row_counts, t.row_places, t.row_state),
        (t.list_members, t.list_counts, t.list_places, t.list_state),
        (t.group_members, t.group_counts, t.group_places, t.group_state),
    ]
    for b, entered in enumerate(trees.entered.tolist()):
        expected, nodes = set(range(entered)), set()
        for level, (members, counts, places, state) in enumerate(levels):
            if level == 2:
                used = {0}
            else:
                used, free = set(range(int(state[b, 0]))), int(state[b, 1])
                while free != NONE:
                    used.remove(free)
                    free = int(counts[b, free])
            found = {}
            for node in used:
                count = int(counts[b, node])
                assert 0 < count < members.shape[2] or not entered
                for place in range(count):
                    found[int(members[b, node, place])] = node * members.shape[2] + place
            assert set(found) == expected, "each member is in one place"
            for member, place in found.items():
                assert places[b, member] == place
            expected, nodes = used, nodes | used


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_changes_leaves_a_tree_whose_codes_are_the_rows(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, rows = draw.choice([1, 5, 8]), torch.zeros(2, 0, 1)
    trees = RowTrees(2, width, 1)
    rows = torch.zeros(2, 900, width)
    touched = torch.zeros(2, dtype=torch.int64)
    for _ in range(60):
        touched = (touched + torch.randint(0, 30, (2,), generator=generator)).clamp(max=900)
        ids = (torch.rand(2, 20, generator=generator) * touched.unsqueeze(1)).long()
        centre = 5 * torch.randn(1, 1, width, generator=generator)
        words = centre + torch.randn(2, 20, width, generator=generator)
        if draw.random() < 0.3:
            words = torch.full_like(words, draw.choice([0.0, 1.0]))
        for b in range(2):
            rows[b, ids[b]] = words[b]
        norms = 1 / (rows.square().sum(-1) + 1e-6).sqrt()
        trees.update(ids, rows, norms)
        trees.absorb(touched, rows, norms)
        assert torch.equal(trees.entered, touched)
    check(trees)
    size = trees.tables.sizes[3]
    for b in range(2):
        place = trees.tables.row_places[b, : int(touched[b])]
        block, lane = place % size // 64, place % size % 64
        codes = trees.tables.row_codes[b, place // size, block, :, lane]
        expected = rows[b, : int(touched[b])] * norms[b, : int(touched[b]), None] * 127
        assert (codes - expected).abs().max() <= 0.5 + 1e-4


def test_lists_that_lose_their_rows_are_given_up():
    """All rows of a full memory move, again and again: no more lists than they need."""
    generator = torch.Generator().manual_seed(0)
    trees, rows = RowTrees(1, 8, 1), torch.randn(1, 600, 8, generator=generator)
    used = []
    for _ in range(12):
        rows = torch.randn(1, 1, 8, generator=generator) * 2 + torch.randn(
            1, 600, 8, generator=generator
        )
        norms = 1 / rows.norm(dim=-1)
        trees.update(torch.arange(600)[None], rows, norms)
        trees.absorb(torch.tensor([600]), rows, norms)
        check(trees)
        used.append(int(trees.tables.row_state[0, 0]))
    assert used[-1] <= 600  # a row at least in each
    found = trees.proposed(unit(rows), 1)
    itself = (found == torch.arange(600).view(1, 600, 1)).any(-1).float()
    assert itself[0, :100].mean() > 0.9  # they moved first: among lists of where rows had been
    assert itself.mean() > 0.97


def test_rows_move_to_lists_that_are_nearer_once_theirs_is_split(monkeypatch):
    """0.86 of them are in the nearest list, 0.79 without that."""
    monkeypatch.setattr(row_tree, "NODE_SIZE", 64)
    generator = torch.Generator().manual_seed(0)
    centres, of_row = torch.randn(400, 8, generator=generator), torch.arange(60_000) % 400
    rows = centres[of_row] + 0.3 * torch.randn(60_000, 8, generator=generator)
    rows = rows.view(3, 20_000, 8)
    norms = 1 / rows.norm(dim=-1)
    trees = RowTrees(3, 8, 1)
    trees.absorb(torch.full((3,), 20_000), rows, norms)
    check(trees)
    for b in range(3):
        lists = trees.tables.row_places[b, :20_000] // 64
        used = lists.unique()
        places = trees.tables.list_places[b, used]
        codes = trees.tables.list_codes[b, places // 64, 0, :, places % 64].float()
        nearest = used[(rows[b] * norms[b].unsqueeze(1) @ codes.T).argmax(1)]
        assert (nearest == lists).float().mean() > 0.83


def test_there_is_room_for_lists_that_are_all_nearly_full():
    """Clusters grow alike: their lists are full at the same time. More groups than a block."""
    generator = torch.Generator().manual_seed(0)
    for size, width, at_once in ((256, 8, 64), (16, 33, 512)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_tree, "NODE_SIZE", size)
            trees = RowTrees(1, width, 1)
        centres = torch.randn(64, width, generator=generator)
        rows = centres.repeat(150, 1) + 0.05 * torch.randn(9_600, width, generator=generator)
        rows = rows.unsqueeze(0)
        norms = 1 / rows.norm(dim=-1)
        for stop in range(at_once, 9_601, at_once):
            trees.absorb(torch.tensor([stop]), rows, norms)
            tables = trees.tables
            assert int(tables.row_state[0, 0]) <= tables.row_counts.shape[1]
            assert int(tables.list_state[0, 0]) <= tables.list_counts.shape[1]
        check(trees)
    assert int(trees.tables.group_counts[0, 0]) > 64


def test_what_is_known_of_the_kernels_here_is_so():
    from sparsemem.kernels import codes, lanes, nearest, tree

    theirs = (codes.PART, tree.FEW, lanes.LANES, nearest.NONE)
    assert theirs == (row_tree.PART, row_tree.FEW, row_tree.LANES, row_tree.NONE)


def write_random(episode, generator, step, width=8):
    """A fresh slot, and two old ones (entered or not) changed."""
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
                episode.search(word, 3)  # lets the trees grow
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
    assert episode._store.trees.entered.tolist() == [700, 700]
    check(episode._store.trees)
    assert hits / total > 0.97


def test_looking_everywhere_equals_the_exact_scan(everywhere):
    episode, exact = grown_pair(400, 64)
    assert episode._store.trees.entered.min() == 400
    queries = torch.randn(2, 20, 8)
    assert torch.equal(episode.search(queries, 4), exact.search(queries, 4))


def test_a_clone_searches_alike():
    episode, _ = grown_pair(700, 64)
    queries, clone = torch.randn(2, 200, 8), episode.clone()
    found = episode.search(queries, 4)
    assert torch.equal(clone.search(queries, 4), found)
    write_random(clone, torch.Generator().manual_seed(3), 700)[0].search(queries, 4)
    assert torch.equal(episode.search(queries, 4), found), "and by itself"


def test_a_full_memory_is_searched_whole(everywhere):
    pair = []
    for limit in (16, None):
        episode = Episode.start(1, 40, 8, index_after=limit)
        for step in range(40):
            episode, _ = write_random(episode, torch.Generator().manual_seed(step), step)
            episode.search(torch.ones(1, 1, 8), 4)
        pair.append(episode)
    queries = torch.randn(1, 20, 8)
    assert torch.equal(pair[0].search(queries, 5), pair[1].search(queries, 5))


def test_episodes_of_uneven_progress(everywhere):
    """Each has its tree, from when it is long."""
    pair = []
    for limit in (16, None):
        generator = torch.Generator().manual_seed(1)
        episode = Episode.start(2, 2**40, 8, index_after=limit)
        for step in range(150):
            slots = torch.tensor([[step], [step // 10]])
            word = torch.randn(2, 1, 8, generator=generator)
            episode = episode.write(slots.unsqueeze(2), torch.ones(2, 1, 1), word, slots)
            episode.search(word, 3)
        pair.append(episode)
    assert pair[0]._store.trees.entered.tolist() == [150, 0]
    queries = torch.randn(2, 20, 8)
    assert torch.equal(pair[0].search(queries, 6), pair[1].search(queries, 6))


def test_an_interrupted_absorb_is_taken_up_again(monkeypatch, everywhere):
    monkeypatch.setattr(row_tree, "ENTERED_AT_ONCE", 4)
    episode, exact = grown_pair(80, 64)
    for step in range(80, 100):
        episode, _ = write_random(episode, torch.Generator().manual_seed(step), step)
        exact, _ = write_random(exact, torch.Generator().manual_seed(step), step)
    calls = []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(self, *arguments)

    put, queries = RowTrees._put, torch.randn(2, 20, 8)
    with monkeypatch.context() as patch:
        patch.setattr(RowTrees, "_put", failing)
        with pytest.raises(KeyboardInterrupt):
            episode.search(queries, 4)
    assert episode._store.trees.entered.tolist() == [84, 84]
    assert torch.equal(episode.search(queries, 4), exact.search(queries, 4))
    check(episode._store.trees)


@pytest.mark.parametrize("model_class", [SAM, SDNC])
def test_models_give_the_same_with_trees_that_are_looked_through(everywhere, model_class):
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
        assert (state.episode._store.trees is not None) == (one is model)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


def test_other_dtypes_and_numbers_that_are_none(everywhere):
    episode = Episode.start(1, 1000, 4, index_after=8, dtype=torch.bfloat16)
    for step in range(60):
        slot, word = torch.tensor([[step]]), torch.randn(1, 1, 4).bfloat16()
        word = word if step % 7 else word * float("nan")
        episode = episode.write(slot.unsqueeze(2), torch.ones(1, 1, 1).bfloat16(), word, slot)
        assert 0 <= int(episode.search(word, 1)) <= step + 1
    assert episode._store.trees.entered.tolist() == [60]
    check(episode._store.trees)


@pytest.fixture
def fresh():
    """Kernels are loaded anew, now and after the test."""
    tree_kernels.load_trees.cache_clear()
    yield
    tree_kernels.load_trees.cache_clear()


@pytest.mark.parametrize("when", ["always", "since"])
def test_without_kernels_rows_are_scanned(when, fresh, monkeypatch):
    if when == "always":
        monkeypatch.setattr(tree_kernels, "compile_trees", lambda: 1 / 0)
        with pytest.warns(RuntimeWarning, match="searches of long episodes run in plain torch"):
            episode, exact = grown_pair(100, 64)
    else:
        episode, exact = grown_pair(100, 64)
        monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    episode, _ = write_random(episode, torch.Generator().manual_seed(5), 100)
    exact, _ = write_random(exact, torch.Generator().manual_seed(5), 100)
    queries = torch.randn(2, 20, 8)
    assert torch.equal(episode.search(queries, 4), exact.search(queries, 4))
    assert np.all(episode._store.trees.entered.numpy() == 0)
