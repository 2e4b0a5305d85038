"""Sequences taken at once by Triton's kernels against the same steps in torch's code.

Each of SIZES takes seconds to compile on a GPU.
"""

import pytest
import torch

from sparsemem import devices
from sparsemem.models.sam import SAM, SAMCell
from tests.kernels.comparing import F32, F64, everything, ids_of
from tests.oracles.synchronisations import Synchronisations

TOLERANCE = {F32: 1e-4, F64: 1e-10}
SIZES = [  # heads, K, W, slots (few: they are used up), hidden units, dtype
    (2, 3, 5, 4, 6, F64),
    (3, 2, 16, 20, 133, F32),
]


@pytest.fixture
def form(triton_device, monkeypatch):
    """form("reference" | "steps" | "sequence"): what runs from here on; sequences at first."""
    at_once, on_cpu = SAMCell.sequence, triton_device.type == "cpu"
    if on_cpu:
        monkeypatch.setattr(devices, "is_device", lambda tensor: True)

    def choose(name):
        kernels = "triton" if on_cpu else "auto"
        monkeypatch.setenv("SPARSEMEM_KERNELS", "reference" if name == "reference" else kernels)
        taken = at_once if name == "sequence" else lambda *_: None
        monkeypatch.setattr(SAMCell, "sequence", taken)

    choose("sequence")
    return choose


@pytest.fixture
def taken(monkeypatch, form):
    """How many steps were taken at once, by call."""
    from sparsemem.kernels.gpu import sequence

    record, advance = [], sequence.advance

    def counting(store, taken, layers):
        record.append(taken.sizes.steps)
        return advance(store, taken, layers)

    monkeypatch.setattr(sequence, "advance", counting)
    return record


def case(sizes, device, steps, batch=2, **options):
    """A model and an input; weights so small that recurrence does not blow rounding up."""
    heads, top_k, width, slots, hidden, dtype = sizes
    torch.manual_seed(heads + steps)
    options = {"interpolation_bias": 0.0, "strength_bias": 2.0, **options}
    model = SAM(3, hidden, 2, slots, width, heads, top_k, **options)
    input = torch.randn(batch, steps, 3, dtype=dtype)
    return model.to(device, dtype), input.to(device).requires_grad_()


def assert_close(ours, truth, dtype):
    for a, b in zip(ours, truth, strict=True):
        tolerance = TOLERANCE[dtype] * max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference(sizes, triton_device, form, taken):
    """From the first step on; few slots: rows are used again, heads meet at one row."""
    model, input = case(sizes, triton_device, 4)
    output, state = model(input)
    assert taken == [4]
    form("reference")
    expected, end = model(input)
    ours, truth = everything(model, input, output, state), everything(model, input, expected, end)
    assert taken == [4]
    assert list(ours) == list(truth)
    assert_close(ours.values(), truth.values(), sizes[-1])
    for a, b in zip(ids_of(state), ids_of(end), strict=True):
        assert torch.equal(a, b)
    assert state.episode._store.order.time == end.episode._store.order.time == 4


def loss_of(output, state):
    """Depends on all that a sequence gives."""
    read, controller = state.read.weights.square().sum(), state.controller
    return output.square().sum() + read + state.reads.sum() + sum(c.sin().sum() for c in controller)


def test_states_handed_on_cut_forked_and_gone_on_with_step_by_step(triton_device, form, taken):
    model, input = case(SIZES[0], triton_device, 2, batch=1)

    def run(*forms):
        losses, state = [], None
        for chunk, name in enumerate(forms):
            form(name)
            output, state = model(input + chunk, state)
            losses.append(loss_of(output, state))
            if chunk == 0:
                other, fork = model(input.flip(1), state.clone())
                losses.append(loss_of(other, fork))
            if chunk == 2:
                state = state.detach()
        losses.append(loss_of(*model(input, fork.detach())))
        parts = [input, *model.parameters()]
        gradients = torch.autograd.grad(sum(losses), parts, retain_graph=True)
        again = torch.autograd.grad(sum(losses), parts)
        torch.testing.assert_close(again, gradients, rtol=1e-12, atol=1e-12)
        return [loss.detach() for loss in losses], gradients, state.episode.rows()

    ours = run("sequence", "steps", "sequence", "sequence")
    assert taken == [2] * 5
    truth = run(*["reference"] * 4)
    assert taken == [2] * 5
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_long_sequences_go_in_chunks(triton_device, form, taken, monkeypatch):
    """The table grows in the first, and the last step is left for itself."""
    monkeypatch.setattr("sparsemem.kernels.sequence.MAX_STEPS", 3)
    model, input = case((2, 3, 5, 10**6, 6, F64), triton_device, 7)
    monkeypatch.setattr("sparsemem.memory.store.FIRST_CAPACITY", 6)
    output, state = model(input)
    assert taken == [3, 3]
    assert state.episode.capacity >= 7 * 2
    form("reference")
    expected, end = model(input)
    ours, truth = everything(model, input, output, state), everything(model, input, expected, end)
    assert_close(ours.values(), truth.values(), F64)
    assert torch.equal(state.touched, end.touched)


def test_nothing_waits_and_the_result_is_the_same_every_time(triton_device, form, taken):
    model, input = case(SIZES[0], triton_device, 3, batch=1)
    runs = []
    for _ in range(2):
        with Synchronisations() as waits:
            output, _ = model(input)
            runs.append(torch.autograd.grad(output.sum(), [input, *model.parameters()]))
        assert waits.found == ["_local_scalar_dense"], "for whether the input is finite"
    assert taken == [3, 3]
    assert all(map(torch.equal, *runs))


def test_dropout_draws_as_step_by_step(triton_device, form, taken):
    model, input = case(SIZES[0], triton_device, 4, bypass_dropout=0.5)

    def run():
        torch.manual_seed(0)
        output, _ = model(input)
        return output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))

    ours = run()
    assert taken == [4]
    form("reference")
    assert_close(ours, run(), F64)


def test_without_gradients(triton_device, form, taken):
    model, input = case(SIZES[0], triton_device, 4)
    with torch.no_grad():
        output, state = model(input[:, :2])
        rest, _ = model(input[:, 2:], state)
    assert taken == [2, 2]
    form("reference")
    assert_close([torch.cat([output, rest], 1)], [model(input)[0].detach()], F64)


def test_only_what_is_asked_for_has_gradients(triton_device, form, taken):
    model, input = case(SIZES[0], triton_device, 2)
    loss = model(input)[0].square().sum()
    whole = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for asked in (model.cell.interface.weight, model.cell.controller.cell.bias_hh):
        model.requires_grad_(False)
        asked.requires_grad_(True)
        (alone,) = torch.autograd.grad(model(input.detach())[0].square().sum(), asked)
        place = [parameter is asked for parameter in model.parameters()].index(True)
        assert_close([alone], [whole[place]], F64)
    assert set(taken) == {2}


def test_the_memory_of_an_unfinished_first_step_is_as_step_by_step(triton_device, form, taken):
    """A state without last reads whose memory was used before."""
    model, input = case((2, 3, 5, 7, 6, F64), triton_device, 3)

    def run():
        start = model.cell.initial_state(2)
        start.episode._store.touch(torch.zeros(2, 1, 1, dtype=torch.int64, device=triton_device), 1)
        return model(input, start)

    output, state = run()
    assert taken == [3]
    form("reference")
    expected, end = run()
    assert_close([output, state.episode.rows()], [expected, end.episode.rows()], F64)
    assert torch.equal(state.touched, end.touched)
