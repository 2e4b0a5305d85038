"""The DNC against plain loops over batch, heads and slots, its options and its invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsemem.indexes.metrics import COSINE_EPSILON
from sparsemem.models.dnc import DNC, DNCState
from sparsemem.models.lstm import LSTM


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(key, row):
    return dot(key, row) / (
        (dot(key, key) + COSINE_EPSILON).sqrt() * (dot(row, row) + COSINE_EPSILON).sqrt()
    )


def softmax(values):
    powers = [value.exp() for value in values]
    return [power / sum(powers) for power in powers]


def oneplus(x):
    return 1 + (1 + x.exp()).log()


def lookup(memory, key, strength, mask):
    """C(M, k, beta) over the slots, key and rows under the mask."""
    masked = [k * m for k, m in zip(key, mask, strict=True)]
    return softmax(
        [
            strength * cosine(masked, [v * m for v, m in zip(row, mask, strict=True)])
            for row in memory
        ]
    )


class Take:
    """Reads an interface vector from its front."""

    def __init__(self, vector):
        self.rest = list(vector.unbind())

    def __call__(self, count):
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


def oracle(model, inputs):
    """Outputs [B, T, Y] and last memory of a DNC, one scalar at a time."""
    outputs, memories = zip(*(oracle_sequence(model, sequence) for sequence in inputs), strict=True)
    return torch.stack(outputs), torch.stack(memories)


def oracle_sequence(model, sequence):
    cell = model.cell
    R, W, N = cell.num_heads, cell.slot_dim, cell.num_slots
    zero = torch.zeros((), dtype=torch.float64)
    memory = [[zero] * W for _ in range(N)]
    usage, precedence, write = [zero] * N, [zero] * N, [zero] * N
    links = [[zero] * N for _ in range(N)]
    reads, read_weights = [[zero] * W] * R, [[zero] * N] * R
    controller, outputs = None, []
    for x in sequence:
        joined = torch.stack([*x.unbind(), *(value for read in reads for value in read)])
        hidden, controller = cell.controller(joined.unsqueeze(0), controller)
        hidden = hidden[0]
        take = Take(cell.interface.weight @ hidden + cell.interface.bias)
        read_keys = [take(W) for _ in range(R)]
        read_strengths = [oneplus(v) for v in take(R)]
        write_key, write_strength = take(W), oneplus(take(1)[0])
        erase, word = [v.sigmoid() for v in take(W)], take(W)
        free = [v.sigmoid() for v in take(R)]
        allocation_gate, write_gate = (take(1)[0].sigmoid() for _ in range(2))
        modes = [softmax(take(3)) for _ in range(R)]
        read_masks, write_mask = [[zero + 1] * W] * R, [zero + 1] * W
        if "write_mask" in cell.parts:
            read_masks = [[v.sigmoid() for v in take(W)] for _ in range(R)]
            write_mask = [v.sigmoid() for v in take(W)]
        sharpness = None
        if "forward_exponents" in cell.parts:
            sharpness = [[oneplus(v) for v in take(R)] for _ in range(2)]
        assert not take.rest

        retained = [zero + 1] * N
        for r in range(R):
            retained = [retained[i] * (1 - free[r] * read_weights[r][i]) for i in range(N)]
        usage = [(usage[i] + write[i] - usage[i] * write[i]) * retained[i] for i in range(N)]
        allocation, less_used = [zero] * N, zero + 1
        for i in sorted(range(N), key=lambda i: (usage[i].item(), i)):
            allocation[i] = (1 - usage[i]) * less_used
            less_used = less_used * usage[i]
        content = lookup(memory, write_key, write_strength, write_mask)
        write = [
            write_gate * (allocation_gate * a + (1 - allocation_gate) * c)
            for a, c in zip(allocation, content, strict=True)
        ]
        for i in range(N):
            kept = retained[i] if cell.dealloc_erase else 1
            memory[i] = [
                memory[i][j] * kept * (1 - write[i] * erase[j]) + write[i] * word[j]
                for j in range(W)
            ]
        links = [
            [
                zero
                if i == j
                else (1 - write[i] - write[j]) * links[i][j] + write[i] * precedence[j]
                for j in range(N)
            ]
            for i in range(N)
        ]
        precedence = [(1 - sum(write)) * precedence[i] + write[i] for i in range(N)]

        for r in range(R):
            previous = read_weights[r]
            forward = [sum(links[i][j] * previous[j] for j in range(N)) for i in range(N)]
            backward = [sum(links[j][i] * previous[j] for j in range(N)) for i in range(N)]
            if sharpness is not None:
                powers = [(v + 1e-6) ** sharpness[0][r] for v in forward]
                forward = [power / sum(powers) for power in powers]
                powers = [(v + 1e-6) ** sharpness[1][r] for v in backward]
                backward = [power / sum(powers) for power in powers]
            content = lookup(memory, read_keys[r], read_strengths[r], read_masks[r])
            weights = [
                modes[r][0] * backward[i] + modes[r][1] * content[i] + modes[r][2] * forward[i]
                for i in range(N)
            ]
            read_weights = [weights if s == r else old for s, old in enumerate(read_weights)]
            read = [sum(weights[i] * memory[i][j] for i in range(N)) for j in range(W)]
            reads = [read if s == r else old for s, old in enumerate(reads)]
        features = torch.stack([*hidden.unbind(), *(v for read in reads for v in read)])
        outputs.append(model.output.weight @ features + model.output.bias)
    return torch.stack(outputs), torch.stack([torch.stack(row) for row in memory])


def make(spread=2.0, **sizes):
    """A float64 DNC whose gates are far from their middle, so that every term counts."""
    sizes = {"input_size": 3, "hidden_size": 5, "output_size": 2, "slot_dim": 3, **sizes}
    model = DNC(**sizes).double()
    nn.init.normal_(model.cell.interface.weight, std=spread)
    nn.init.normal_(model.cell.interface.bias)
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
    options=st.sets(st.sampled_from(["masked", "dealloc_erase", "link_sharpening"])),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None)
def test_equals_the_loops(batch, steps, slots, heads, options, seed):
    torch.manual_seed(seed)
    model = make(num_slots=slots, num_heads=heads, **dict.fromkeys(options, True))
    inputs = torch.randn(batch, steps, 3, dtype=torch.float64, requires_grad=True)
    output, state = model(inputs)
    actual = output, state.memory.rows
    assert_equal_with_gradients(model, inputs, oracle(model, inputs), actual)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, 0),
        ({"masked": True}, 4 * 16 + 16),
        ({"dealloc_erase": True}, 0),
        ({"link_sharpening": True}, 2 * 4),
    ],
)
def test_interface_size(options, extra):
    model = DNC(8, 20, 8, **options)  # R = 4, W = 16
    assert model.cell.interface.out_features == 4 * 16 + 3 * 16 + 5 * 4 + 3 + extra


def test_freeing_erases_only_with_dealloc_erase():
    """The memory after freeing all that was read, without writing: scaled by psi, or as it was."""
    rows = {}
    for erases in (False, True):
        torch.manual_seed(1)
        model = make(num_slots=4, num_heads=1, dealloc_erase=erases)
        _, state = model(torch.randn(1, 3, 3, dtype=torch.float64))
        names = list(model.cell.parts)
        with torch.no_grad():
            offset = dict(
                zip(names, torch.tensor([0, *model.cell.part_sizes]).cumsum(0), strict=False)
            )
            model.cell.interface.weight.zero_()
            model.cell.interface.bias[offset["free_gates"]] = 50.0
            model.cell.interface.bias[offset["write_gate"]] = -50.0
        before = state.memory.rows
        _, after = model(torch.randn(1, 1, 3, dtype=torch.float64), state)
        kept = 1 - state.read_weights[:, 0].unsqueeze(-1) if erases else 1.0
        torch.testing.assert_close(after.memory.rows, before * kept, rtol=0, atol=1e-12)
        rows[erases] = after.memory.rows
    assert not torch.equal(rows[False], rows[True])


def test_link_sharpening_raises_the_largest_link():
    links = torch.zeros(1, 3, 3, dtype=torch.float64)
    links[0, 1, 0], links[0, 2, 0] = 0.6, 0.4
    at_zero = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    forward = {}
    for sharpens in (False, True):
        model = make(num_slots=3, num_heads=1, link_sharpening=sharpens)
        with torch.no_grad():
            model.cell.interface.weight.zero_()
            model.cell.interface.bias.zero_()
            offset = dict(
                zip(
                    model.cell.parts,
                    torch.tensor([0, *model.cell.part_sizes]).cumsum(0),
                    strict=False,
                )
            )
            model.cell.interface.bias[offset["write_gate"]] = -100.0
            model.cell.interface.bias[offset["read_modes"] + 2] = 100.0  # forward
            if sharpens:
                model.cell.interface.bias[offset["forward_exponents"]] = 9.0
        state = model.initial_state(1)._replace(links=links, read_weights=at_zero)
        _, state = model(torch.zeros(1, 1, 3, dtype=torch.float64), state)
        forward[sharpens] = state.read_weights[0, 0]
    torch.testing.assert_close(forward[False], links[0, :, 0], rtol=0, atol=1e-12)
    exponent = 1 + torch.tensor(9.0, dtype=torch.float64).exp().log1p()
    powers = (links[0, :, 0] + 1e-6) ** exponent
    torch.testing.assert_close(forward[True], powers / powers.sum(), rtol=0, atol=1e-12)
    assert forward[True][1] > 0.98


def assert_states_close(one, other):
    for a, b in zip(one[1:], other[1:], strict=True):  # all but the controller's
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_chunks_equal_one_call():
    model = make(num_slots=6, num_heads=2)
    inputs = torch.randn(2, 9, 3, dtype=torch.float64)
    whole, last = model(inputs)
    state, parts = None, []
    for chunk in inputs.split(4, 1):
        part, state = model(chunk, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    assert_states_close(state, last)


def test_batch_equals_one_by_one():
    model = make(num_slots=6, num_heads=2, masked=True, dealloc_erase=True, link_sharpening=True)
    inputs = torch.randn(3, 6, 3, dtype=torch.float64)
    together, _ = model(inputs)
    alone = torch.cat([model(sequence)[0] for sequence in inputs.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_state_members():
    model = DNC(3, 5, 2, num_slots=4, slot_dim=3, num_heads=2)
    state = model.initial_state(3)
    assert (state.batch_size, state.touched.tolist(), state.access) == (3, [4, 4, 4], None)
    _, state = model(torch.randn(3, 2, 3))
    access = state.access
    assert access.read_ids[2, 1].tolist() == [0, 1, 2, 3]
    assert access.write_ids.shape == (3, 1, 4)
    assert torch.equal(access.read_weights, state.read_weights)
    assert torch.equal(access.write_weights[:, 0], state.write_weights)
    assert state.memory.rows.requires_grad
    assert not state.detach().memory.rows.requires_grad
    copy = state.clone()
    assert torch.equal(copy.links, state.links)
    assert copy.links.data_ptr() != state.links.data_ptr()
    double = state.to(torch.float64)
    assert isinstance(double, DNCState)
    assert double.controller[1].dtype == double.memory.rows.dtype == torch.float64


def test_detached_state_cuts_the_gradient():
    model = make(num_slots=4, num_heads=1)
    first = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    _, state = model(first)
    output, _ = model(torch.randn(1, 2, 3, dtype=torch.float64), state.detach())
    (gradient,) = torch.autograd.grad(output.sum(), first, allow_unused=True)
    assert gradient is None


@pytest.mark.usefixtures("plain_errors")
def test_refused_states():
    model = DNC(3, 5, 2, num_slots=4, slot_dim=3, num_heads=2)
    inputs = torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match=r"state has batch size 3, input has batch size 2"):
        model(inputs, model.initial_state(3))
    with pytest.raises(TypeError, match=r"state is a LSTMState, DNCCell expects DNCState"):
        model(inputs, LSTM(3, 5, 2).initial_state(2))
    for sizes in ({"num_slots": 5}, {"slot_dim": 4}, {"num_heads": 1}):
        other = DNC(3, 5, 2, **{"num_slots": 4, "slot_dim": 3, "num_heads": 2, **sizes})
        with pytest.raises(
            ValueError,
            match=r"state has num_slots, slot_dim, num_heads = \(.*\), the model has \(4, 3, 2\)",
        ):
            model(inputs, other.initial_state(2))
    with pytest.raises(TypeError, match=r"state is torch.float64 on cpu, the model's parameters"):
        model(inputs, model.initial_state(2).to(torch.float64))


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(
    "name", ["input_size", "hidden_size", "output_size", "num_slots", "slot_dim", "num_heads"]
)
def test_refused_sizes(name):
    sizes = {"input_size": 3, "hidden_size": 5, "output_size": 2}
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        DNC(**{**sizes, name: 0})
    with pytest.raises(TypeError, match=f"{name} is 2.0, expected an int"):
        DNC(**{**sizes, name: 2.0})


class Stateless(nn.Module):
    """A controller without a state."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, input, state=None):
        return self.layer(input).tanh(), ()


def test_another_controller():
    model = make(num_slots=4, num_heads=1, controller=Stateless)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    output, state = model(inputs)
    assert_equal_with_gradients(model, inputs, oracle(model, inputs), (output, state.memory.rows))
    assert state.access is not None
    assert state.detach().clone().controller == ()
