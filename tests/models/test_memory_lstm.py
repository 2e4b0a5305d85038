import copy

import pytest
import torch

from sparsemem import LSTM, MemoryBank, MemoryLayer, MemoryLSTM
from sparsemem.models.registry import bank_argument, make_model, needs_bank

B, T, X, HIDDEN, Y = 3, 5, 4, 6, 2


def a_bank(**changes):
    options = {"num_rows": 40, "width": 4, "value_width": 3, "initial": "normal"} | changes
    return MemoryBank(**options)


def a_model(bank=None, dtype=torch.float64, **options):
    torch.manual_seed(1)
    bank = a_bank(dtype=dtype) if bank is None else bank
    return MemoryLSTM(X, HIDDEN, Y, bank, num_heads=2, top_k=3, **options).to(dtype)


def by_hand(model, input):
    """The equations, step by step, over all rows."""
    lstm, layer, bank = model.cell.lstm, model.cell.memory, model.cell.memory.bank
    hidden = memory = input.new_zeros(len(input), HIDDEN)
    outputs = []
    for x in input.unbind(1):
        gates = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
        gates = gates + hidden @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * memory.tanh()
        queries = layer.query_norm(layer.query(hidden).view(-1, 2, 4))
        norms = (queries.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        rows = bank.keys / (bank.keys.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        best = ((queries / norms) @ rows.T).topk(3)
        weights = (best.values / layer.log_temperature.exp()[:, None]).softmax(-1)
        read = (weights.unsqueeze(-1) * bank.values[best.indices]).sum((1, 2))
        outputs.append(model.output(torch.cat([hidden, layer.out(read)], 1)))
    return torch.stack(outputs, 1), hidden, memory


def test_it_is_the_equations():
    model, input = a_model(), torch.randn(B, T, X, dtype=torch.float64)
    output, state = model(input)
    expected, hidden, memory = by_hand(model, input)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state.hidden, hidden)
    torch.testing.assert_close(state.memory, memory)
    assert state.touched.tolist() == [0, 0, 0]
    assert state.access is None


def test_gradients_are_those_of_the_equations_and_sparse_for_rows():
    model, input = a_model(), torch.randn(B, T, X, dtype=torch.float64)
    bank, weight = model.cell.memory.bank, torch.randn(B, T, Y, dtype=torch.float64)
    (by_hand(model, input)[0] * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model(input)[0] * weight).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if parameter in (set(bank.parameters())):
            assert gradient.is_sparse
            assert gradient._nnz() == B * T * 2 * 3
            gradient = gradient.to_dense()
        torch.testing.assert_close(gradient, expected[name])


def test_a_sequence_is_one_read_and_equals_its_pieces_and_steps():
    model, input = a_model(), torch.randn(B, T, X, dtype=torch.float64)
    before = model.cell.memory.bank.book.now
    output, last = model(input)
    assert model.cell.memory.bank.book.now == before + 1
    first, state = model(input[:, :2])
    second, state = model(input[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), output)
    torch.testing.assert_close(state.hidden, last.hidden)
    state, steps = model.initial_state(B), []
    for x in input.unbind(1):
        features, state = model.cell(x, state)
        steps.append(model.output(features))
    torch.testing.assert_close(torch.stack(steps, 1), output)


@pytest.mark.parametrize("index", ["exact", "product-key"])
def test_any_bank_will_do(index):
    metric = "ip" if index == "product-key" else "cosine"
    bank = a_bank(num_rows=49, index=index, metric=metric)
    model = a_model(bank, torch.float32, gated=True, query_norm="none", temperature=1.0)
    output, _ = model(torch.randn(B, T, X))
    output.sum().backward()
    assert output.shape == (B, T, Y)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_wrong_is_said():
    model = a_model(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"top_k is 41, expected at most bank\.num_rows = 40"):
        MemoryLSTM(X, HIDDEN, Y, a_bank(), top_k=41)
    with pytest.raises(ValueError, match=r"input has shape \(3, 5, 3\)"):
        model(torch.randn(B, T, 3))
    with pytest.raises(ValueError, match="state has hidden_size = 7, the model has 6"):
        model(torch.randn(B, T, X), LSTM(X, 7, Y).initial_state(B))
    with pytest.raises(ValueError, match="state has batch size 2, input has batch size 3"):
        model(torch.randn(B, T, X), model.initial_state(2))
    with pytest.raises(TypeError, match=r"state is torch.float64"):
        model(torch.randn(B, T, X), model.initial_state(B).to(torch.float64))


def test_the_forget_gate_starts_open():
    bias = a_model().cell.lstm.bias_ih_l0.detach()
    assert bias[HIDDEN : 2 * HIDDEN].mean() > 0.5 > bias[:HIDDEN].max()


def test_a_copy_has_a_bank_of_its_own():
    model = a_model(dtype=torch.float32)
    other, input = copy.deepcopy(model), torch.randn(B, T, X)
    with torch.no_grad():
        other.cell.memory.bank.write(torch.arange(40), torch.zeros(40, 4), torch.zeros(40, 3))
    assert not torch.equal(model(input)[0], other(input)[0])


def test_models_by_name_take_a_bank():
    bank = a_bank()
    model = make_model("Memory-LSTM", bank, input_size=X, output_size=Y, hidden_size=HIDDEN)
    assert model.cell.memory.bank is bank
    assert isinstance(model.cell.memory, MemoryLayer)
    keys = MemoryBank(40, 4, initial="normal")
    sam = make_model("sam", keys, input_size=X, output_size=Y, hidden_size=HIDDEN)
    assert (sam.cell.memory, sam.cell.num_slots, sam.cell.slot_dim) == (keys, 40, 4)
    assert (bank_argument("sam"), bank_argument("lstm")) == ("memory", None)
    assert [needs_bank(name) for name in ("memory-lstm", "sam", "lstm")] == [True, False, False]
    with pytest.raises(ValueError, match="bank is given, but model 'lstm' reads none"):
        make_model("lstm", bank, input_size=X, output_size=Y, hidden_size=HIDDEN)
    with pytest.raises(ValueError, match="model 'memory-lstm' needs a bank"):
        make_model("memory-lstm", input_size=X, output_size=Y, hidden_size=HIDDEN)
