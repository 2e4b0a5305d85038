"""Fused steps against the torch code that they stand in for."""

import random

import pytest
import torch
from torch.autograd import gradcheck

from sparsemem.kernels import fused
from sparsemem.memory import episode
from sparsemem.models.sam import SAM, SAMCell
from sparsemem.models.sdnc import SDNC
from tests.kernels.comparing import F32, F64, assert_same, everything, ids_of, random_case
from tests.oracles import dense_sam
from tests.seeds import seeds

pytest.importorskip("numba")
MODELS = [SAM, SDNC]


@pytest.fixture(autouse=True)
def step_by_step(monkeypatch):
    """Sequences are tested in test_sequence.py."""
    monkeypatch.setattr(SAMCell, "sequence", lambda *_: None)


@pytest.fixture
def switch(monkeypatch):
    """switch(True): steps are fused from here on; switch(False): the torch code runs."""

    def choose(on):
        monkeypatch.setenv("SPARSEMEM_KERNELS", "auto" if on else "reference")

    choose(True)
    return choose


@pytest.fixture
def taken(monkeypatch):
    """For each step of a model whether it was fused."""
    record = []

    def take_step(*arguments):
        step = fused.take_step(*arguments)
        record.append(step is not None)
        return step

    monkeypatch.setattr(episode, "take_step", take_step)
    return record


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(("dtype", "seed"), seeds(40, 10, F64) + seeds(20, 5, F32))
def test_equals_the_reference(model_class, dtype, seed, switch, taken):
    """With weights so small that recurrence does not blow rounding up."""
    model, input = random_case(model_class, seed, dtype)
    output, state = model(input)
    assert taken == [True] * input.shape[1]
    switch(False)
    expected, end = model(input)
    assert not any(taken[input.shape[1] :])
    ours, truth = everything(model, input, output, state), everything(model, input, expected, end)
    assert_same(ours, truth, dtype)
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", seeds(15, 5))
def test_equals_the_dense_transcription(model_class, seed, switch, taken):
    model, input = random_case(model_class, seed + 100, F64, scales=(1, 3))
    output, state = model(input)
    expected, dense = dense_sam.run(model, input)
    assert all(taken)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    inputs, weights = [input, *model.parameters()], torch.randn_like(output)
    ours, truth = (
        torch.autograd.grad((result * weights).sum(), inputs) for result in (output, expected)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    rows = state.episode.rows()
    torch.testing.assert_close(rows, dense.memory[:, : rows.shape[1]].detach())


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", seeds(10, 4))
def test_forks_cuts_and_a_change_of_code_on_the_way(model_class, seed, switch):
    """A sequence in chunks, fused or not at random, cut and cloned, against the torch code."""

    def run(mixed):
        draw = random.Random(seed)
        model, input = random_case(model_class, seed + 200, F64)
        model, losses, state, other = model.double(), [], None, None
        for chunk in input.repeat(1, 3, 1).split(max(1, input.shape[1] // 2), 1):
            switch(draw.random() < 0.5 and mixed)
            output, state = model(chunk, state)
            losses.append(output.square().sum())
            action = draw.random()
            if action < 0.2:
                state = state.detach()
            elif action < 0.6:
                other = state.clone()
                output, _ = model(chunk.flip(1), other)
                losses.append(output.sum())
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


def test_gradcheck(switch, taken):
    model = SAM(3, 6, 2, num_slots=4, slot_dim=5, num_heads=2, top_k=3).double()
    model.requires_grad_(False)
    torch.manual_seed(5)
    input = torch.randn(2, 5, 3, dtype=F64, requires_grad=True)
    assert gradcheck(lambda x: model(x)[0], input)
    assert all(taken)


def test_elements_may_have_touched_different_numbers_of_rows(switch, taken):
    """What one reads far out is not what another has touched."""
    model = SAM(3, 6, 2, num_slots=50, slot_dim=4, num_heads=1, top_k=5).double()
    torch.manual_seed(0)
    input = torch.randn(2, 12, 3, dtype=F64)
    input[1] = 0  # one element writes the same all the time
    output, state = model(input)
    switch(False)
    expected, end = model(input)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert torch.equal(state.touched, end.touched)


@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("model_class", MODELS)
def test_not_a_number_surfaces_and_ids_stay_in_range(model_class, where, switch, taken):
    torch.manual_seed(1)
    model = model_class(3, 6, 2, num_slots=20, slot_dim=4, num_heads=2, top_k=3)
    input, state = torch.randn(2, 6, 3), None
    _, state = model(input)
    if where == "weight":
        model.cell.interface.weight.data[0, 0] = torch.inf
    else:
        model.cell.controller.cell.bias_ih.data[0] = torch.nan
    for _ in range(3):
        output, state = model(input, state)
        for ids in (state.access.read_ids, state.access.write_ids):
            assert 0 <= int(ids.min()) <= int(ids.max()) < 20
    assert not output.isfinite().all()
    output.sum().backward()
    assert all(taken)


def test_other_dtypes_take_the_torch_code(switch, taken):
    model = SAM(3, 6, 2, num_slots=20, slot_dim=4, num_heads=1, top_k=3).bfloat16()
    model(torch.randn(2, 3, 3).bfloat16())
    assert taken == [False] * 3


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("num_slots", [52, 1000])
def test_a_long_episode_is_searched_through_its_index(model_class, num_slots, switch, taken):
    """Short enough that all lists are looked into: nothing is missed."""
    sizes = {"num_slots": num_slots, "slot_dim": 5, "num_heads": 2, "top_k": 3}
    torch.manual_seed(0)
    indexed = model_class(3, 6, 2, **sizes, index_after=8).double()
    exact = model_class(3, 6, 2, **sizes, index_after=None).double()
    exact.load_state_dict(indexed.state_dict())
    input = torch.randn(2, 30, 3, dtype=F64, requires_grad=True)
    output, state = indexed(input)
    assert all(taken)
    assert state.episode._store.trees.entered.min() >= 32, "the trees were used"
    switch(False)
    expected, end = exact(input)
    ours, truth = everything(indexed, input, output, state), everything(exact, input, expected, end)
    assert_same(ours, truth, F64)
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)


def test_least_recent_slots_asked_for_in_between_change_nothing(switch):
    model = SAM(3, 6, 2, num_slots=9, slot_dim=4, num_heads=2, top_k=3).double()
    input = torch.randn(2, 12, 3, dtype=F64)

    def run():
        state, outputs = None, []
        for chunk in input.split(3, 1):
            output, state = model(chunk, state)
            state.episode.least_recent(5)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    output, state = run()
    switch(False)
    expected, end = run()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert torch.equal(state.episode.least_recent(9), end.episode.least_recent(9))


@pytest.mark.parametrize("model_class", MODELS)
def test_threads_change_nothing_bit_for_bit(model_class, switch, taken, monkeypatch):
    monkeypatch.setattr("sparsemem.kernels.threads.WORK", 1)
    model = model_class(3, 6, 2, num_slots=40, slot_dim=5, num_heads=2, top_k=3)
    input = torch.randn(5, 12, 3, requires_grad=True)
    output, state = model(input)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # torch itself goes on with one
    threaded, end = model(input)
    assert all(taken)
    assert torch.equal(threaded, output)
    ours, truth = everything(model, input, threaded, end), everything(model, input, output, state)
    assert all(torch.equal(ours[name], value) for name, value in truth.items())
