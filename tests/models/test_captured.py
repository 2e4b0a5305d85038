"""Captured sequences: what is captured and when, and that replays equal the model."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsemem
from sparsemem.models.captured import Captured, CapturedState
from tests.oracles.fake_graphs import FakeGraphs

SIZES = {"input_size": 3, "hidden_size": 8, "output_size": 2}
MODELS = {
    "sam": lambda: sparsemem.SAM(**SIZES, num_slots=64, slot_dim=8, num_heads=2, top_k=3),
    "sdnc": lambda: sparsemem.SDNC(**SIZES, num_slots=64, slot_dim=8, num_heads=2, top_k=3),
    "ntm": lambda: sparsemem.NTM(**SIZES, num_slots=16, slot_dim=8),
    "dnc": lambda: sparsemem.DNC(**SIZES, num_slots=16, slot_dim=8),
    "lstm": lambda: sparsemem.LSTM(**SIZES),
}


@pytest.fixture
def graphs(monkeypatch):
    return FakeGraphs.stand_in(monkeypatch)


@pytest.fixture
def model():
    return MODELS["sam"]()


def inputs(count: int, batch: int = 2, steps: int = 5, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shape = (count, batch, steps, SIZES["input_size"])
    return torch.randn(shape, generator=generator).to(device).unbind(0)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def backward(model, input):
    output, state = model(input)
    output.square().sum().backward()
    return output.detach(), state


def assert_same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_shape_is_captured_at_its_second_time_and_replayed_from_then_on(graphs, model):
    fast = sparsemem.captured(model)
    for number, input in enumerate(inputs(4)):
        output, state = fast(input)
        assert isinstance(state, CapturedState) == (number > 0)
        assert_same(output, model(input)[0])
        del output
    assert graphs.captured == [(2, 5, 3)]
    assert graphs.replays == 3
    assert fast.num_graphs == 1


@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_models_own_outputs_gradients_and_touched(graphs, name):
    model = MODELS[name]()
    plain, fast = copy.deepcopy(model), sparsemem.captured(model)
    for input in inputs(4):
        plain.zero_grad()
        fast.zero_grad()
        expected, state = backward(plain, input)
        output, left = backward(fast, input)
        assert_same(output, expected)
        assert_same(gradients(model), gradients(plain))
        assert left.touched.tolist() == state.touched.tolist()
        assert left.batch_size == 2
    assert graphs.replays == 3


def test_outputs_and_gradients_outlive_the_next_replay(graphs, model):
    fast = sparsemem.captured(model)
    kept = []
    for input in inputs(4):
        model.zero_grad()  # sets them to None: the next ones are not the same tensors
        output, state = backward(fast, input)
        kept.append((output, state.touched, [p.grad for p in model.parameters()]))
    copies = [(o.clone(), t.clone(), [g.clone() for g in gs]) for o, t, gs in kept]
    backward(fast, inputs(5)[4])
    assert graphs.replays == 4
    for (output, touched, grads), (output_, touched_, grads_) in zip(
        kept[:-1], copies, strict=False
    ):
        assert torch.equal(output, output_)
        assert torch.equal(touched, touched_)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_, strict=True))


@pytest.mark.parametrize("zeroed", [False, True])
def test_gradients_add_up_over_batches(graphs, model, zeroed):
    plain, fast = copy.deepcopy(model), sparsemem.captured(model)
    for net in (plain, fast):
        for input in inputs(5):
            backward(net, input)
        if zeroed:
            net.zero_grad(set_to_none=False)
        for input in inputs(2):
            backward(net, input)
    assert graphs.replays == 6
    assert_same(gradients(model), gradients(plain))


def test_a_sequence_beside_one_that_waits_for_its_backward_pass_runs_plainly(graphs, model):
    plain, fast = copy.deepcopy(model), sparsemem.captured(model)
    for input in inputs(2):
        backward(fast, input)
    assert graphs.replays == 1
    model.zero_grad()
    for net in (plain, fast):
        first, second = (net(input)[0] for input in inputs(2))
        (first.square().sum() + second.square().sum()).backward()
    assert graphs.replays == 2
    assert_same(gradients(model), gradients(plain))
    output, _ = fast(inputs(1)[0])
    assert graphs.replays == 3
    del output  # given up: nothing waits any more
    fast(inputs(1)[0])
    assert graphs.replays == 4


@pytest.mark.parametrize("replayed", [False, True])
def test_going_backward_again_is_refused(graphs, model, replayed):
    fast = sparsemem.captured(model)
    first, second = inputs(2)
    backward(fast, first)
    output, _ = fast(first)
    output.sum().backward(retain_graph=True)
    if replayed:
        backward(fast, second)
    with pytest.raises(RuntimeError, match="twice, or after another was replayed"):
        output.sum().backward()
    backward(fast, second)


def test_inputs_get_gradients(graphs, model):
    fast = sparsemem.captured(model)
    for input in inputs(3):
        ours, theirs = (input.clone().requires_grad_() for _ in range(2))
        backward(fast, ours)
        backward(model, theirs)
        assert_same(ours.grad, theirs.grad)
    assert graphs.replays == 2


def test_moved_or_replaced_parameters_are_captured_anew(graphs, model):
    fast = sparsemem.captured(model)
    input = inputs(1)[0]
    for _ in range(2):
        fast(input)
    for _ in range(2):
        with torch.no_grad():
            model.output.bias.add_(1.0)  # in place: as an optimiser does
        assert_same(fast(input)[0], model(input)[0])
    assert graphs.captured == [(2, 5, 3)]
    model.output.bias = nn.Parameter(torch.ones(2))
    for _ in range(2):
        assert_same(fast(input)[0], model(input)[0])
    assert len(graphs.captured) == 2
    model.output.bias.data = torch.zeros(2)  # as Module.to does
    for _ in range(2):
        assert_same(fast(input)[0], model(input)[0])
    assert len(graphs.captured) == 3
    assert fast.num_graphs == 1


@pytest.mark.parametrize("case", ["state", "cpu", "inference", "hook", "global hook", "patched"])
def test_all_else_runs_as_the_model_does(graphs, model, case, monkeypatch):
    fast = sparsemem.captured(model)
    input, handle = inputs(1)[0], None
    if case == "cpu":
        monkeypatch.undo()
    if case == "hook":
        model.cell.interface.register_forward_hook(lambda *_: None)
    if case == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    if case == "patched":
        model.cell.interface.forward = model.cell.interface.forward
    try:
        with torch.inference_mode(case == "inference"):
            for _ in range(3):
                state = model.initial_state(2) if case == "state" else None
                output, left = fast(input, state)
                assert isinstance(left, model.cell.state_type)
                assert_same(output, model(input)[0])
    finally:
        if handle is not None:
            handle.remove()
    assert graphs.captured == []


def test_a_model_over_a_bank_is_not_captured(graphs):
    bank = sparsemem.MemoryBank(16, 8, metric="cosine")
    bank.append(torch.randn(16, 8))
    model = sparsemem.SAM(**SIZES, num_heads=2, top_k=3, memory=bank)
    fast = sparsemem.captured(model)
    for input in inputs(3):
        fast(input)
    assert graphs.captured == []


def test_what_cannot_be_captured_is_said_once(graphs, model):
    graphs.error = ValueError("a wait while capturing")
    fast = sparsemem.captured(model)
    input = inputs(1)[0]
    fast(input)
    with pytest.warns(RuntimeWarning, match=r"shape \(2, 5, 3\) .*: ValueError: a wait"):
        output, state = fast(input)
    assert_same(output, model(input)[0])
    assert isinstance(state, model.cell.state_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (5, 6, 6, 6):
            fast(inputs(1, steps=steps)[0])
    assert fast.failure == "ValueError: a wait while capturing"
    assert graphs.captured == []


def test_a_wrong_input_is_refused_before_a_replay(graphs, model):
    fast = sparsemem.captured(model)
    input = inputs(1)[0]
    for _ in range(2):
        fast(input)
    bad = input.clone()
    bad[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"input\[1, 2, 0\] is nan"):
        fast(bad)
    assert graphs.replays == 1
    fast(bad.nan_to_num())
    assert graphs.replays == 2


def test_a_captured_state_says_that_it_is_none(graphs, model):
    fast = sparsemem.captured(model)
    input = inputs(1)[0]
    for _ in range(2):
        _, state = fast(input)
    assert state.detach() is state
    with pytest.raises(RuntimeError, match="cannot be gone on with"):
        fast(input, state)
    with pytest.raises(TypeError, match="CapturedState, SAMCell expects SAMState"):
        model(input, state)
    with pytest.raises(AttributeError, match="no 'episode', only touched"):
        _ = state.episode


def test_it_is_a_module_with_the_models_parameters(model):
    fast = sparsemem.captured(model)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]
    assert fast.eval().model is model
    assert not model.cell.training


def test_arguments(plain_errors):
    with pytest.raises(TypeError, match="model is a Linear, expected a MemoryModel"):
        Captured(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_graphs is 0, expected at least 1"):
        Captured(MODELS["lstm"](), max_graphs=0)


def test_parameters_changed_before_the_backward_pass_are_refused(graphs, model):
    fast = sparsemem.captured(model)
    for input in inputs(2):
        output, _ = fast(input)
    assert fast.num_graphs == 1
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="changed in place between a captured sequence and"):
        output.sum().backward()


# On a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_graphs_equal_the_model(name):
    device = gpu()
    plain = MODELS[name]().to(device)
    fast = sparsemem.captured(copy.deepcopy(plain))
    for input in inputs(5, batch=3, steps=8, device=device):
        plain.zero_grad()
        fast.zero_grad()
        expected, state = backward(plain, input)
        output, left = backward(fast, input)
        assert fast.failure is None
        assert_same(output, expected)
        assert_same(gradients(fast), gradients(plain))
        assert left.touched.tolist() == state.touched.tolist()
    assert fast.num_graphs == 1
    backward(fast, input)  # accumulated: twice the same
    assert_same(gradients(fast), [2 * part for part in gradients(plain)])
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(input)[0], plain(input)[0])


@pytest.mark.gpu
def test_training_through_graphs_takes_the_same_course():
    device = gpu()
    losses = []
    start = MODELS["sam"]().to(device)
    for wrap in (lambda model: model, sparsemem.captured):
        model = wrap(copy.deepcopy(start))
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        course = []
        for number in range(20):
            input = inputs(20, batch=4, steps=6 + number % 2, device=device)[number]
            optimiser.zero_grad()
            loss = (model(input)[0] - input[..., :2]).square().mean()
            loss.backward()
            optimiser.step()
            course.append(loss.item())
        losses.append(course)
    assert model.num_graphs == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.gpu
def test_dropout_differs_from_replay_to_replay():
    device = gpu()
    model = sparsemem.SAM(**SIZES, num_slots=64, slot_dim=8, bypass_dropout=0.5).to(device)
    fast = sparsemem.captured(model)
    input = inputs(1, device=device)[0]
    outputs = [fast(input)[0].detach() for _ in range(4)]
    assert fast.num_graphs == 1
    assert not torch.equal(outputs[2], outputs[3])


def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")
