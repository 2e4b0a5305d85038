"""Sequences taken at once against the same steps taken one by one."""

import random

import pytest
import torch
from torch.autograd import gradcheck

from sparsemem.kernels import sequence
from sparsemem.kernels.sequence import MAX_STEPS
from sparsemem.memory import row_tree
from sparsemem.models.sam import SAM
from tests.kernels.comparing import F32, F64, assert_same, everything, ids_of, random_case, small
from tests.oracles import dense_sam
from tests.seeds import seeds

pytest.importorskip("numba")
FORMS = ["reference", "steps", "sequence"]


def loss_of(output, state):
    """Depends on all that a sequence gives."""
    read, controller = state.read.weights.square().sum(), state.controller
    return output.square().sum() + read + state.reads.sum() + sum(c.sin().sum() for c in controller)


@pytest.mark.parametrize(("dtype", "seed"), seeds(40, 10, F64) + seeds(20, 5, F32))
def test_equals_the_reference(dtype, seed, form, taken):
    """With weights so small that recurrence does not blow rounding up."""
    model, input = random_case(SAM, seed, dtype)
    output, state = model(input)
    assert taken == ([0, input.shape[1] - 1] if input.shape[1] > 2 else taken)
    form("reference")
    expected, end = model(input)
    ours, truth = everything(model, input, output, state), everything(model, input, expected, end)
    assert_same(ours, truth, dtype)
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)
    assert state.episode._store.order.time == end.episode._store.order.time


@pytest.mark.parametrize("seed", seeds(15, 5))
def test_equals_the_dense_transcription(seed, form):
    model, input = random_case(SAM, seed + 100, F64, scales=(1, 3))
    output, state = model(input)
    expected, dense = dense_sam.run(model, input)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    inputs, weights = [input, *model.parameters()], torch.randn_like(output)
    ours, truth = (
        torch.autograd.grad((result * weights).sum(), inputs) for result in (output, expected)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    rows = state.episode.rows()
    torch.testing.assert_close(rows, dense.memory[:, : rows.shape[1]].detach())


@pytest.mark.parametrize("seed", seeds(20, 6))
def test_forks_cuts_and_changes_of_form_on_the_way(seed, form):
    """A sequence in chunks, in any form, cut and cloned, against the torch code: every gradient
    that flows into a state and out of it.
    """

    def run(mixed):
        draw = random.Random(seed)
        model, input = random_case(SAM, seed + 200, F64)
        losses, state = [], None
        for chunk in input.repeat(1, 3, 1).split(max(2, input.shape[1] // 2), 1):
            form(draw.choice(FORMS if mixed else ["reference"] * 3))
            output, state = model(chunk, state)
            losses.append(loss_of(output, state))
            action = draw.random()
            if action < 0.2:
                state = state.detach()
            elif action < 0.6:
                losses.append(loss_of(*model(chunk.flip(1), state.clone())))
        parameters = [input, *model.parameters()]
        gradients = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
        again = torch.autograd.grad(sum(losses), parameters)
        for a, b in zip(gradients, again, strict=True):
            assert torch.equal(a, b), "a second backward pass"
        return [loss.detach() for loss in losses], gradients, state.episode.rows()

    (losses, gradients, rows), (true_losses, true_gradients, true_rows) = run(True), run(False)
    torch.testing.assert_close(losses, true_losses, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients, true_gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(rows, true_rows, rtol=1e-9, atol=1e-11)


def test_gradcheck_from_a_state_on(form, taken):
    model = small(num_slots=6, num_heads=1, top_k=2).requires_grad_(False)
    first = torch.randn(2, 2, 3, dtype=F64)
    input = torch.randn(2, 4, 3, dtype=F64, requires_grad=True)
    states = []

    def run(hidden, input):
        _, state = model(first)
        controller = (state.controller[0] + hidden, state.controller[1] * hidden)
        output, state = model(input, state._replace(controller=controller))
        states.append(state)
        return output, state.read.weights, state.controller[1]

    assert gradcheck(run, (torch.randn(2, 6, dtype=F64, requires_grad=True), input))
    assert set(taken) == {0, 4}, "the first step alone, and four at once"


def test_what_is_not_differentiated_costs_nothing_and_changes_nothing(form):
    def gradients(names):
        model, input = small(), torch.linspace(-1, 1, 60, dtype=F64).view(2, 10, 3)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names is None or name in names)
        model(input)[0].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(None)
    for names in ({"cell.interface.weight"}, {"cell.controller.cell.weight_hh"}, {"output.bias"}):
        part = gradients(names)
        assert set(part) == names
        for name in names:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-12, atol=1e-12)


def test_a_state_serves_once(form):
    model = small()
    _, state = model(torch.randn(2, 5, 3, dtype=F64))
    model(torch.randn(2, 5, 3, dtype=F64), state)
    with pytest.raises(RuntimeError, match="already advanced"):
        model(torch.randn(2, 5, 3, dtype=F64), state)


def test_second_derivatives_are_refused(form):
    model = small()
    input = torch.randn(2, 5, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(input)[0].sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("num_slots", [30, 10_000])
def test_long_sequences_are_taken_in_parts(grad, num_slots, form, taken):
    model, input = small(num_slots=num_slots), torch.randn(2, 2 * MAX_STEPS + 20, 3, dtype=F64)
    with torch.set_grad_enabled(grad):
        output, state = model(input)
        assert taken == [0, MAX_STEPS, MAX_STEPS, 19]
        form("steps")
        expected, end = model(input)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.episode.rows(), end.episode.rows(), rtol=0, atol=1e-11)
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)


def test_it_goes_on_where_trees_begin(form, taken, monkeypatch):
    """All lists are looked into: nothing is missed."""
    monkeypatch.setattr(row_tree, "NODE_SIZE", 16)
    monkeypatch.setattr(row_tree, "PROBED_LISTS", 1_000)
    model = small(num_slots=1000, index_after=40)
    input = torch.randn(2, 100, 3, dtype=F64, requires_grad=True)
    output, state = model(input)
    assert taken == [0, 99]
    trees = state.episode._store.trees
    assert trees.entered.min() >= 40
    form("reference")
    expected, end = model(input)
    assert not end.episode._store.trees.entered.any(), "the reference scans"
    ours, truth = everything(model, input, output, state), everything(model, input, expected, end)
    assert_same(ours, truth, F64)
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)


def test_it_stops_before_trees_that_it_has_no_code_for(form, taken, monkeypatch):
    """Up to there it takes steps at once; from there on one at a time, which find by trees."""
    model, input = small(num_slots=1000, index_after=40), torch.randn(2, 40, 3, dtype=F64)
    chunks = [*input.split(2, 1)]
    expected = [output for output, _ in along(model, chunks)]
    assert all(taken[1:]), "whole chunks"
    taken.clear()
    monkeypatch.setattr(sequence, "can_find", lambda dtype: False)
    for (output, state), same in zip(along(model, chunks), expected, strict=True):
        torch.testing.assert_close(output, same, rtol=0, atol=1e-12)
        last = state
    assert (taken[1], taken[-1]) == (2, 0)
    assert last.episode._store.trees.entered.min() >= 40


def test_where_the_reference_is_asked_for_nothing_is_compiled(monkeypatch):
    def fail(dtype):
        raise AssertionError("compiled")

    monkeypatch.setattr(sequence, "can_find", fail)
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    model = small(num_slots=1000, index_after=40)
    _, state = model(torch.randn(2, 60, 3, dtype=F64))
    model(torch.randn(2, 2, 3, dtype=F64), state)


def along(model, chunks):
    """Outputs and states, chunk by chunk."""
    state = None
    for chunk in chunks:
        output, state = model(chunk, state)
        yield output, state


@pytest.mark.parametrize("num_slots", [60, 100_000])
def test_long_episodes_step_by_step_and_in_chunks(num_slots, form, taken, monkeypatch):
    """Lists that are not looked into hide the same rows; a full memory begins laps."""
    monkeypatch.setattr(row_tree, "NODE_SIZE", 16)
    monkeypatch.setattr(row_tree, "PROBED_LISTS", 2)
    model, input = small(num_slots=num_slots, index_after=30), torch.randn(2, 120, 3, dtype=F64)
    output, end = model(input)
    state, parts = None, []
    for chunk in input.split(7, 1):
        part, state = model(chunk, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.episode.rows(), end.episode.rows(), rtol=0, atol=1e-12)
    form("steps")
    expected, stepped = model(input)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    for a, b in zip(ids_of(end), ids_of(stepped), strict=True):
        assert torch.equal(a, b)


def test_least_recent_slots_asked_for_in_between_change_nothing(form):
    model, input = small(num_slots=9), torch.randn(2, 12, 3, dtype=F64)

    def run():
        state, outputs = None, []
        for chunk in input.split(3, 1):
            output, state = model(chunk, state)
            state.episode.least_recent(5)
            outputs.append(output)
        return torch.cat(outputs, 1), state.episode.least_recent(9)

    output, order = run()
    form("reference")
    expected, true_order = run()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert torch.equal(order, true_order)


def test_a_sequence_that_failed_leaves_a_gradient_pass_clean(form):
    """What a pass towards a late input only left in the buffer does not leak into the next."""
    model, input = small(), torch.randn(2, 8, 3, dtype=F64, requires_grad=True)
    first, state = model(input)
    hidden = state.reads
    second, _ = model(input, state)
    torch.autograd.grad(second.sum(), hidden, retain_graph=True)
    ours = torch.autograd.grad(second.sum() + first.sum(), input)
    fresh, state = model(input)
    later, _ = model(input, state)
    truth = torch.autograd.grad(later.sum() + fresh.sum(), input)
    assert torch.equal(ours[0], truth[0])


@pytest.fixture
def threads(monkeypatch):
    """threads(n): kernels use so many from here on, however little there is to do."""
    monkeypatch.setattr("sparsemem.kernels.threads.WORK", 1)

    def use(count):  # torch itself goes on with one
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)

    return use


def one_of(calls):
    """Instead of `at_once`: only the part that is most behind takes steps, the last of those."""

    def run(part, parts):
        calls.append(len(parts))
        reached = [first for *_, first in parts]
        chosen = len(parts) - 1 - reached[::-1].index(min(reached))
        reached[chosen] = part(*parts[chosen])
        return reached

    return run


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(("num_slots", "index_after"), [(13, None), (400, None), (1000, 40)])
@pytest.mark.parametrize("in_step", [True, False])
def test_threads_change_nothing_bit_for_bit(
    batch_size, num_slots, index_after, in_step, form, taken, threads, monkeypatch
):
    """Of laps, which end for some and not for others, all parts go through together."""
    monkeypatch.setattr(row_tree, "NODE_SIZE", 16)
    model = small(num_slots=num_slots, index_after=index_after).float()
    input = torch.randn(batch_size, 40, 3, requires_grad=True)
    output, state = model(input)
    calls = []
    threads(3)
    if not in_step:
        monkeypatch.setattr(sequence, "at_once", one_of(calls))
    threaded, end = model(input)
    assert taken == [0, 39] * 2
    assert in_step or max(calls) == (1 if num_slots == 13 else min(batch_size, 3))
    assert torch.equal(threaded, output)
    ours, truth = everything(model, input, threaded, end), everything(model, input, output, state)
    assert all(torch.equal(ours[name], value) for name, value in truth.items())
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)
    assert state.episode._store.order.time == end.episode._store.order.time


def test_parts_that_no_tree_is_compiled_for_do_not_go_apart(form, threads, monkeypatch):
    """The room for a step after a part's last may be for one that begins a tree."""
    monkeypatch.setattr(sequence, "can_find", lambda dtype: False)
    torch.manual_seed(2)
    model = SAM(3, 6, 2, num_slots=1000, slot_dim=5, num_heads=2, top_k=3, index_after=66)
    generator = torch.Generator().manual_seed(2)  # elements that touch 59 to 65 slots
    first, scales = torch.randn(4, 1, 3, generator=generator), torch.tensor([0.1, 5.0, 0.1, 5.0])
    later = scales.view(4, 1, 1) * torch.randn(4, 40, 3, generator=generator)
    input = torch.cat([first, later], 1)[:, :13]
    output, state = model(input)
    threads(4)
    threaded, end = model(input)
    assert len(set(state.touched.tolist())) > 1
    assert torch.equal(end.touched, state.touched)
    assert torch.equal(threaded, output)


@pytest.mark.parametrize("count", [1, 2])
def test_a_state_whose_sequence_was_interrupted_is_refused(count, form, threads, monkeypatch):
    model, input = small(), torch.randn(2, 9, 3, dtype=F64)
    _, state = model(input)
    run = sequence.at_once

    def interrupted(*given):
        run(*given)
        raise KeyboardInterrupt

    threads(count)
    monkeypatch.setattr(sequence, "at_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(input, state)
    monkeypatch.setattr(sequence, "at_once", run)
    with pytest.raises(RuntimeError, match="already advanced"):
        model(input, state)


def test_an_element_does_not_depend_on_those_beside_it(form):
    model, input = small().float(), torch.randn(5, 20, 3)
    output, _ = model(input)
    for b in range(5):
        alone, _ = model(input[b : b + 1])
        torch.testing.assert_close(alone[0], output[b], rtol=0, atol=1e-6)


def for_python(part):
    """A part of the kernels as Python can call it."""
    from numba import njit

    return njit(lambda *given: part(*given))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_nonlinearities_to_the_last_bits(dtype):
    from sparsemem.kernels.controller import sigmoids, tanhs

    edges = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e-9, -800.0, 800.0], dtype=dtype)
    values = torch.cat([torch.linspace(-90, 90, 20_001, dtype=dtype), edges])
    for part, function in ((sigmoids, torch.sigmoid), (tanhs, torch.tanh)):
        ours = values.clone()
        for_python(part)(ours.numpy())
        close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps, "equal_nan": True}
        torch.testing.assert_close(ours, function(values), **close)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 8), (9, 33), (40, 6)])
@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 5), (1, 3), (2, 5)])
def test_products(rows, columns, begin, end):
    from sparsemem.kernels.controller import add_product

    inputs, weights = torch.randn(5, rows + 2, dtype=F64), torch.randn(rows, columns, dtype=F64)
    outputs = torch.randn(5, columns + 3, dtype=F64)
    expected = outputs.clone()
    expected[begin:end, :columns] += inputs[begin:end, :rows] @ weights
    for_python(add_product)(inputs.numpy(), weights.numpy(), outputs.numpy(), begin, end)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
