import gc
import weakref

import pytest
import torch
from torch.autograd import gradcheck

from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode

F64 = torch.float64


def start(batch_size=1, num_slots=8, slot_dim=3, **options):
    return Episode.start(batch_size, num_slots, slot_dim, **{"dtype": F64, **options})


def ids(*values):
    return torch.tensor(values)


def script(weights, words, queries):
    """Writes with overlaps, erasures and repeated ids, with reads between them."""
    episode, results = start(), []
    plan = [
        (ids([[0, 1], [1, 1]]), ids([0, 2]), ids([[0, 1, 2], [1, 1, 5]])),
        (ids([[1, 0], [2, 3]]), ids([1, 1]), ids([[1, 3, 3], [0, 2, 6]])),
        (ids([[0, 4], [0, 2]]), ids([5, 4]), ids([[4, 0, 1], [2, 2, 3]])),
    ]
    for step, (write, erase, read) in enumerate(plan):
        episode = episode.write(write, weights[step], words[step], erase)
        rows, episode = episode.read(read)
        results.append((rows * queries[step].unsqueeze(2)).tanh())
    return torch.cat(results)


def dense_script(weights, words, queries):
    """The same with a dense tensor that autograd follows."""
    memory, results = torch.zeros(8, 3, dtype=F64), []
    plan = [
        ([[0, 1], [1, 1]], [0, 2], [[0, 1, 2], [1, 1, 5]]),
        ([[1, 0], [2, 3]], [1, 1], [[1, 3, 3], [0, 2, 6]]),
        ([[0, 4], [0, 2]], [5, 4], [[4, 0, 1], [2, 2, 3]]),
    ]
    for step, (write, erase, read) in enumerate(plan):
        kept = torch.ones(8, 1, dtype=F64)
        kept[erase] = 0
        memory = memory * kept
        for head in range(2):
            for entry, slot in enumerate(write[head]):
                one = torch.zeros(8, 1, dtype=F64)
                one[slot] = 1
                memory = memory + one * weights[step, 0, head, entry] * words[step, 0, head]
        rows = memory[torch.tensor(read)][None]
        results.append((rows * queries[step].unsqueeze(2)).tanh())
    return torch.cat(results)


def script_inputs():
    torch.manual_seed(3)
    shapes = [(3, 1, 2, 2), (3, 1, 2, 3), (3, 1, 2, 3)]
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]


def test_writes_and_reads_equal_a_dense_memory_in_values_and_gradients():
    inputs = script_inputs()
    ours, dense = script(*inputs), dense_script(*inputs)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-14)
    seed = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, seed),
        torch.autograd.grad(dense, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_gradcheck():
    assert gradcheck(script, script_inputs())


def write_one(episode, slot, word, weight=1.0):
    weight = torch.tensor([[[weight]]], dtype=F64)
    return episode.write(ids([[slot]]), weight, word.view(1, 1, -1), ids([slot]))


@pytest.mark.parametrize("base", [0.0, 0.5])
def test_an_untouched_row_holds_the_base(base):
    episode = start(num_slots=2**40, base=base)
    rows, episode = episode.read(torch.tensor([[[0, 5, 200]]]))
    assert torch.equal(rows, torch.full((1, 1, 3, 3), base, dtype=F64))
    assert episode.touched.tolist() == [201]


def test_nothing_of_the_size_of_the_memory_is_allocated():
    episode = start(num_slots=2**40)
    for slot in range(300):
        episode = write_one(episode, slot, torch.ones(3, dtype=F64))
    assert episode.touched.tolist() == [300]
    assert 300 <= episode.capacity <= 600


def test_search_ranks_touched_and_untouched_rows():
    episode = start(num_slots=2**40)
    for slot, word in enumerate([[1.0, 0, 0], [-1.0, 0, 0], [1.0, 0, 0], [1.0, 1.0, 0]]):
        episode = write_one(episode, slot, torch.tensor(word, dtype=F64))
    query = torch.tensor([[[1.0, 0, 0]]], dtype=F64)
    # Slots 0 and 2 tie, untouched slots 4 and 5 beat the opposite row 1.
    assert episode.search(query, 5).tolist() == [[[0, 2, 3, 4, 5]]]
    assert episode.search(torch.zeros_like(query), 3).tolist() == [[[0, 1, 2]]]


def test_search_in_a_full_memory_returns_all_rows():
    episode = start(num_slots=3)
    for slot, word in enumerate([[-1.0, 0, 0], [0.0, 1, 0], [1.0, 0, 0]]):
        episode = write_one(episode, slot, torch.tensor(word, dtype=F64))
    query = torch.tensor([[[1.0, 0, 0]]], dtype=F64)
    assert episode.search(query, 3).tolist() == [[[2, 1, 0]]]


def test_an_advanced_handle_is_refused_and_named_clone():
    first = start()
    write_one(first, 0, torch.ones(3, dtype=F64))
    message = r"this state was already advanced .*state\.clone\(\) forks it"
    for use in (
        lambda: write_one(first, 0, torch.ones(3, dtype=F64)),
        lambda: first.search(torch.ones(1, 1, 3, dtype=F64), 1),
        lambda: first.read(ids([[0]])),
        lambda: first.detach(),
        lambda: first.clone(),
        lambda: first.mark_accessed(Entries(ids([[0]]), torch.ones(1, 1, 1))),
    ):
        with pytest.raises(RuntimeError, match=message):
            use()


def test_a_second_complete_backward_gives_the_same_gradient():
    word = torch.ones(3, dtype=F64, requires_grad=True)
    rows, _ = write_one(start(), 0, word).read(ids([[0]]))
    first, second = (
        torch.autograd.grad(rows.square().sum(), word, retain_graph=True)[0] for _ in range(2)
    )
    assert first.tolist() == second.tolist() == [2.0] * 3


def test_an_unfinished_backward_leaves_nothing_behind():
    early = torch.ones(3, dtype=F64, requires_grad=True)
    late = torch.ones(3, dtype=F64, requires_grad=True)
    episode = write_one(start(), 0, early)
    first, episode = episode.read(ids([[0]]))
    episode = write_one(episode, 1, late)
    rows, _ = episode.read(ids([[0, 1]]))
    torch.autograd.grad(rows.sum(), late, retain_graph=True)  # stops before the first write
    (gradient,) = torch.autograd.grad(first.sum(), early, retain_graph=True)
    assert gradient.tolist() == [1.0] * 3, "this pass starts below where the last one stopped"
    torch.autograd.grad(rows.sum(), late, retain_graph=True)
    (gradient,) = torch.autograd.grad(rows.sum(), early)
    assert gradient.tolist() == [1.0] * 3


def test_second_derivatives_are_refused():
    word = torch.ones(3, dtype=F64, requires_grad=True)
    rows, _ = write_one(start(), 0, word).read(ids([[0]]))
    (gradient,) = torch.autograd.grad(rows.square().sum(), word, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_gradient_gets_past_steps_without_gradients():
    early = torch.ones(3, dtype=F64, requires_grad=True)
    episode = write_one(start(), 0, early)
    before, episode = episode.read(ids([[0]]))
    with torch.no_grad():
        episode = write_one(episode, 1, torch.ones(3, dtype=F64))
    late = torch.ones(3, dtype=F64, requires_grad=True)
    after, _ = write_one(episode, 2, late).read(ids([[0, 2]]))
    gradients = torch.autograd.grad(10 * before.sum() + after.sum(), [early, late])
    assert [gradient.tolist() for gradient in gradients] == [[10.0] * 3, [1.0] * 3]


def test_nothing_keeps_a_finished_episode_alive():
    word = torch.ones(3, dtype=F64, requires_grad=True)
    gc.disable()
    try:
        episode = write_one(start(), 0, word)
        fork = episode.clone()
        rows, episode = episode.read(ids([[0]]))
        other, fork = fork.read(ids([[0]]))
        (rows + other).sum().backward()
        stores = [weakref.ref(episode._store), weakref.ref(fork._store)]
        del episode, fork, rows, other
        assert [store() for store in stores] == [None, None]
    finally:
        gc.enable()


def test_detach_cuts_the_gradient_and_keeps_the_rows():
    word = torch.ones(3, dtype=F64, requires_grad=True)
    cut = write_one(start(), 0, word).detach()
    later = torch.full((3,), 2.0, dtype=F64, requires_grad=True)
    weight = torch.ones(1, 1, 1, dtype=F64)
    after = cut.write(ids([[0]]), weight, later.view(1, 1, 3), ids([7]))
    rows, _ = after.read(ids([[0]]))
    assert torch.equal(rows.flatten(), torch.full((3,), 3.0, dtype=F64))
    rows.sum().backward()
    assert word.grad is None
    assert torch.equal(later.grad, torch.ones(3, dtype=F64))


def test_the_gradient_buffer_is_given_back_clean():
    episode = start()
    for _ in range(3):
        word = torch.randn(3, dtype=F64, requires_grad=True)
        rows, episode = write_one(episode.detach(), 1, word).read(ids([[1, 2]]))
        rows.square().sum().backward()
        torch.testing.assert_close(word.grad, 2 * word.detach(), rtol=0, atol=1e-15)
        (buffer,) = episode._store._spare
        assert not buffer.any()


def test_forks_are_independent_and_both_give_gradients():
    word = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    other = torch.tensor([5.0, 5.0, 5.0], dtype=F64, requires_grad=True)
    trunk = write_one(start(), 0, word)
    fork = trunk.clone()
    trunk = write_one(trunk, 0, other)  # erases slot 0 in the trunk only
    in_trunk, _ = trunk.read(ids([[0]]))
    in_fork, _ = fork.read(ids([[0]]))
    assert in_trunk.flatten().tolist() == [5.0, 5.0, 5.0]
    assert in_fork.flatten().tolist() == [1.0, 2.0, 3.0]
    (in_trunk.sum() + 10 * in_fork.sum()).backward()
    assert word.grad.tolist() == [10.0] * 3
    assert other.grad.tolist() == [1.0] * 3


def test_a_fork_of_a_fork_gives_gradients_to_the_trunk():
    word = torch.ones(3, dtype=F64, requires_grad=True)
    trunk = write_one(start(), 0, word)
    fork = trunk.clone()
    second = fork.clone()
    losses = [episode.read(ids([[0, 0]]))[0].sum() for episode in (trunk, fork, second)]
    (losses[0] + 10 * losses[1] + 100 * losses[2]).backward()
    assert word.grad.tolist() == [222.0] * 3


def test_a_fork_that_outgrows_its_trunk_gives_each_element_its_own_gradient():
    words = torch.ones(2, 1, 3, dtype=F64, requires_grad=True)
    weights = torch.ones(2, 1, 1, dtype=F64)
    zero = torch.zeros(2, 1, dtype=torch.int64)
    trunk = start(batch_size=2, num_slots=2**40).write(zero[..., None], weights, words, zero)
    fork = trunk.clone()
    for slot in range(1, 200):  # past the capacity that the trunk has
        there = torch.full((2, 1), slot)
        fork = fork.write(there[..., None], weights, torch.ones_like(words), there)
    everything = torch.arange(200).expand(2, 1, 200)
    in_fork, _ = fork.read(everything)
    in_trunk, _ = trunk.read(zero[..., None])
    factor = torch.tensor([1.0, 10.0], dtype=F64).view(2, 1, 1, 1)
    ((in_fork * factor).sum() + in_trunk.sum()).backward()
    assert words.grad.flatten().tolist() == [2.0] * 3 + [11.0] * 3


def test_a_grown_memory_takes_a_new_gradient_buffer():
    episode = start(num_slots=2**40)
    for slot in (0, 100):
        word = torch.ones(3, dtype=F64, requires_grad=True)
        rows, episode = write_one(episode.detach(), slot, word).read(ids([[slot]]))
        rows.sum().backward()
        assert word.grad.tolist() == [1.0] * 3


def test_to_copies_dtype():
    episode = write_one(start(), 0, torch.ones(3, dtype=F64))
    copy = episode.to(torch.float32)
    assert copy.rows().dtype == torch.float32
    assert torch.equal(copy.rows(), episode.rows().float())


@pytest.mark.parametrize("bad", [-1, 8])
def test_ids_out_of_range_are_refused_before_anything_changes(bad):
    episode = start()
    word = torch.ones(3, dtype=F64)
    with pytest.raises(ValueError, match=rf"ids holds slot {bad}, expected 0 \.\. 7"):
        episode.write(ids([[bad]]), torch.ones(1, 1, 1, dtype=F64), word.view(1, 1, 3), ids([0]))
    with pytest.raises(ValueError, match=rf"ids holds slot {bad}, expected 0 \.\. 7"):
        episode.read(ids([[bad]]))
    assert episode.touched.tolist() == [0]
    assert write_one(episode, 0, word).rows().tolist() == [[[1.0, 1.0, 1.0]]]


def test_tensors_are_checked_before_anything_changes(plain_errors):
    episode, word = start(), torch.ones(1, 1, 3, dtype=F64)
    slot, weight, erase = ids([[0]]), torch.ones(1, 1, 1, dtype=F64), ids([0])
    for shape in ((1, 1, 4), (2, 1, 3), (1, 3)):
        with pytest.raises(ValueError, match=r"queries has shape .*, expected \(1, 1, 3\)"):
            episode.search(torch.ones(shape, dtype=F64), 1)
    with pytest.raises(TypeError, match=r"queries is torch\.float32 .* rows are torch\.float64"):
        episode.search(word.float(), 1)
    with pytest.raises(ValueError, match=r"words has shape \(1, 1, 4\), expected \(1, 1, 3\)"):
        episode.write(slot, weight, torch.ones(1, 1, 4, dtype=F64), erase)
    with pytest.raises(ValueError, match=r"weights has shape \(1, 1, 2\), expected \(1, 1, 1\)"):
        episode.write(slot, torch.ones(1, 1, 2, dtype=F64), word, erase)
    with pytest.raises(TypeError, match=r"words is torch\.float32 .* rows are torch\.float64"):
        episode.write(slot, weight, word.float(), erase)
    with pytest.raises(ValueError, match=r"erase has batch size 2, the memory has 1 episodes"):
        episode.write(slot, weight, word, torch.zeros(2, 1, dtype=torch.int64))
    assert episode.write(slot, weight, word, erase).rows().tolist() == [[[1.0, 1.0, 1.0]]]


def test_sizes_are_checked(plain_errors):
    with pytest.raises(ValueError, match=r"num_slots is 0, expected at least 1"):
        Episode.start(1, 0, 3)
    with pytest.raises(ValueError, match=r"k is 9, expected at most num_slots = 8"):
        start().search(torch.ones(1, 1, 3, dtype=F64), 9)
