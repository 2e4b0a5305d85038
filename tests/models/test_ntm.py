"""The NTM against plain loops over batch, heads and slots, and its invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsemem.indexes.metrics import COSINE_EPSILON
from sparsemem.models.dnc import DNC
from sparsemem.models.ntm import NTM, NTMState


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(values):
    powers = [value.exp() for value in values]
    return [power / sum(powers) for power in powers]


def softplus(x):
    return (1 + x.exp()).log()


def address(entries, width, memory, previous):
    """Content, interpolation, shift, sharpening of one head: its weights over the slots."""
    key, (strength, gate, exponent), shift = entries[:width], entries[width : width + 3], entries
    shift = softmax(shift[width + 3 :])
    slots, reach = len(memory), len(shift) // 2
    similarity = [
        dot(key, row)
        / ((dot(key, key) + COSINE_EPSILON).sqrt() * (dot(row, row) + COSINE_EPSILON).sqrt())
        for row in memory
    ]
    content = softmax([softplus(strength) * value for value in similarity])
    gate = gate.sigmoid()
    gated = [gate * c + (1 - gate) * p for c, p in zip(content, previous, strict=True)]
    shifted = [
        sum(
            gated[(i - offset) % slots] * shift[reach + offset]
            for offset in range(-reach, reach + 1)
        )
        for i in range(slots)
    ]
    powers = [value ** (1 + softplus(exponent)) for value in shifted]
    return [power / sum(powers) for power in powers]


def oracle(model, inputs):
    outputs, memories = zip(*(oracle_sequence(model, sequence) for sequence in inputs), strict=True)
    return torch.stack(outputs), torch.stack(memories)


def oracle_sequence(model, sequence):
    """Outputs [T, Y] and last memory [N, W] of an NTM, one scalar at a time."""
    cell = model.cell
    H, W, N = cell.num_heads, cell.slot_dim, cell.num_slots
    memory = [[torch.tensor(1e-6, dtype=torch.float64)] * W for _ in range(N)]
    write_weights, read_weights = (
        [softmax(list(head.unbind())) for head in part] for part in cell.initial_weights
    )
    reads = [list(read.tanh().unbind()) for read in cell.initial_reads]
    controller, outputs = None, []
    for x in sequence:
        joined = torch.stack([*x.unbind(), *(value for read in reads for value in read)])
        hidden, controller = cell.controller(joined.unsqueeze(0), controller)
        hidden = hidden[0]
        interface = (cell.interface.weight @ hidden + cell.interface.bias).clamp(-20, 20)
        per_head = len(interface) // H
        location = (per_head - 2 * W) // 2
        heads = [list(interface[h * per_head : (h + 1) * per_head].unbind()) for h in range(H)]
        write_weights = [
            address(head[:location], W, memory, old)
            for head, old in zip(heads, write_weights, strict=True)
        ]
        for i in range(N):
            for j in range(W):
                for head, weights in zip(heads, write_weights, strict=True):
                    erase = head[2 * location + j].sigmoid()
                    memory[i] = [*memory[i]]
                    memory[i][j] = memory[i][j] * (1 - weights[i] * erase)
                for head, weights in zip(heads, write_weights, strict=True):
                    memory[i][j] = memory[i][j] + weights[i] * head[2 * location + W + j].tanh()
        read_weights = [
            address(head[location : 2 * location], W, memory, old)
            for head, old in zip(heads, read_weights, strict=True)
        ]
        reads = [
            [sum(weights[i] * memory[i][j] for i in range(N)) for j in range(W)]
            for weights in read_weights
        ]
        features = torch.stack([*hidden.unbind(), *(v for read in reads for v in read)])
        outputs.append(model.output.weight @ features + model.output.bias)
    return torch.stack(outputs), torch.stack([torch.stack(row) for row in memory])


def make(spread=1.0, **sizes):
    """A float64 NTM whose gates and initial weights are far from their middle."""
    sizes = {"input_size": 3, "hidden_size": 5, "output_size": 2, "slot_dim": 3, **sizes}
    model = NTM(**sizes).double()
    nn.init.normal_(model.cell.interface.weight, std=spread)
    nn.init.normal_(model.cell.initial_weights)
    nn.init.normal_(model.cell.initial_reads)
    return model


def assert_equal_with_gradients(model, inputs, expected, actual):
    """Values and the gradients of a random projection of them, to 1e-10."""
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)
    leaves = [inputs, *model.parameters()]
    projections = [torch.randn_like(value) for value in expected]
    gradients = [
        torch.autograd.grad(
            sum((value * p).sum() for value, p in zip(values, projections, strict=True)),
            leaves,
        )
        for values in (expected, actual)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@given(
    batch=st.integers(1, 2),
    steps=st.integers(2, 4),
    slots=st.integers(1, 5),
    heads=st.integers(1, 2),
    shift_range=st.integers(0, 2),
    spread=st.sampled_from([1.0, 10.0]),  # 10: entries beyond the clip, too
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None)
def test_equals_the_loops(batch, steps, slots, heads, shift_range, spread, seed):
    torch.manual_seed(seed)
    model = make(spread, num_slots=slots, num_heads=heads, shift_range=shift_range)
    inputs = torch.randn(batch, steps, 3, dtype=torch.float64, requires_grad=True)
    output, state = model(inputs)
    assert_equal_with_gradients(model, inputs, oracle(model, inputs), (output, state.memory.rows))


def test_interface_is_clipped():
    model = make(num_slots=4, num_heads=1)
    inputs = torch.randn(1, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.cell.interface.weight.zero_()
        model.cell.interface.bias.copy_(torch.randn_like(model.cell.interface.bias).sign() * 20)
        at_clip, _ = model(inputs)
        model.cell.interface.bias.mul_(1000)
        beyond, _ = model(inputs)
    assert torch.equal(at_clip, beyond)


def test_initial_memory_is_constant():
    state = NTM(3, 5, 2, num_slots=4, slot_dim=3).initial_state(2)
    assert torch.equal(state.memory.rows, torch.full((2, 4, 3), 1e-6))


def test_chunks_equal_one_call():
    model = make(num_slots=6, num_heads=2)
    inputs = torch.randn(2, 9, 3, dtype=torch.float64)
    whole, last = model(inputs)
    state, parts = None, []
    for chunk in inputs.split(4, 1):
        part, state = model(chunk, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[1:], last[1:], rtol=0, atol=1e-12)


def test_batch_equals_one_by_one():
    model = make(num_slots=6, num_heads=2)
    inputs = torch.randn(3, 6, 3, dtype=torch.float64)
    together, _ = model(inputs)
    alone = torch.cat([model(sequence)[0] for sequence in inputs.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_state_members():
    model = NTM(3, 5, 2, num_slots=4, slot_dim=3, num_heads=2)
    state = model.initial_state(3)
    assert (state.batch_size, state.touched.tolist(), state.access) == (3, [4, 4, 4], None)
    _, state = model(torch.randn(3, 2, 3))
    access = state.access
    assert access.read_ids[2, 1].tolist() == access.write_ids[0, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(access.read_weights, state.read_weights)
    assert torch.equal(access.write_weights, state.write_weights)
    sums = access.write_weights.sum(-1)
    torch.testing.assert_close(sums, torch.ones(3, 2))
    assert state.memory.rows.requires_grad
    assert not state.detach().memory.rows.requires_grad
    copy = state.clone()
    assert torch.equal(copy.memory.rows, state.memory.rows)
    assert copy.memory.rows.data_ptr() != state.memory.rows.data_ptr()
    double = state.to(torch.float64)
    assert isinstance(double, NTMState)
    assert double.controller[1].dtype == double.memory.rows.dtype == torch.float64


@pytest.mark.usefixtures("plain_errors")
def test_refused_states():
    model = NTM(3, 5, 2, num_slots=4, slot_dim=3, num_heads=2)
    inputs = torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match=r"state has batch size 3, input has batch size 2"):
        model(inputs, model.initial_state(3))
    other = DNC(3, 5, 2, num_slots=4, slot_dim=3, num_heads=2)
    with pytest.raises(TypeError, match=r"state is a DNCState, NTMCell expects NTMState"):
        model(inputs, other.initial_state(2))
    smaller = NTM(3, 5, 2, num_slots=3, slot_dim=3, num_heads=2)
    with pytest.raises(
        ValueError,
        match=r"num_slots, slot_dim, num_heads = \(3, 3, 2\), the model has \(4, 3, 2\)",
    ):
        model(inputs, smaller.initial_state(2))
    with pytest.raises(TypeError, match=r"state is torch.float64 on cpu, the model's parameters"):
        model(inputs, model.initial_state(2).to(torch.float64))


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(
    "name", ["input_size", "hidden_size", "output_size", "num_slots", "slot_dim", "num_heads"]
)
def test_refused_sizes(name):
    sizes = {"input_size": 3, "hidden_size": 5, "output_size": 2}
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        NTM(**{**sizes, name: 0})


@pytest.mark.usefixtures("plain_errors")
def test_refused_shift_range():
    with pytest.raises(ValueError, match=r"shift_range is -1, expected at least 0"):
        NTM(3, 5, 2, shift_range=-1)


class GRU(nn.Module):
    """A controller whose state is one tensor."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.cell = nn.GRUCell(input_size, hidden_size)

    def forward(self, input, state=None):
        hidden = self.cell(input, state)
        return hidden, hidden


def test_another_controller():
    model = make(num_slots=4, num_heads=1, controller=GRU)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    output, state = model(inputs)
    assert_equal_with_gradients(model, inputs, oracle(model, inputs), (output, state.memory.rows))
