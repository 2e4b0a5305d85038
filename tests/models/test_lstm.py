"""The LSTM baseline against torch's own, and its state."""

import pytest
import torch
from torch import nn

from sparsemem.models.lstm import LSTM, LSTMState
from sparsemem.models.ntm import NTM


def test_equals_torch_lstm():
    model = LSTM(3, 5, 2).double()
    reference = nn.LSTM(3, 5, batch_first=True).double()
    for name, value in model.cell.lstm.named_parameters():
        getattr(reference, f"{name}_l0").data.copy_(value)
    inputs = torch.randn(2, 7, 3, dtype=torch.float64)
    hidden, (last_hidden, last_cell) = reference(inputs)
    output, state = model(inputs)
    torch.testing.assert_close(output, model.output(hidden), rtol=0, atol=1e-12)
    torch.testing.assert_close(state.hidden, last_hidden[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state.memory, last_cell[0], rtol=0, atol=1e-12)


def test_chunks_and_single_sequences_equal_one_call():
    model = LSTM(3, 5, 2).double()
    inputs = torch.randn(2, 7, 3, dtype=torch.float64)
    whole, _ = model(inputs)
    first, state = model(inputs[:, :4])
    second, _ = model(inputs[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    alone = torch.cat([model(sequence)[0] for sequence in inputs.split(1)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)


def test_state_members():
    model = LSTM(3, 5, 2)
    _, state = model(torch.randn(3, 2, 3))
    assert (state.batch_size, state.touched.tolist(), state.access) == (3, [0, 0, 0], None)
    assert state.touched.dtype == torch.int64
    assert state.hidden.requires_grad
    assert not state.detach().hidden.requires_grad
    copy = state.clone()
    assert torch.equal(copy.memory, state.memory)
    assert copy.memory.data_ptr() != state.memory.data_ptr()
    double = state.to(torch.float64)
    assert isinstance(double, LSTMState)
    assert double.hidden.dtype == double.memory.dtype == torch.float64


@pytest.mark.usefixtures("plain_errors")
def test_refused_states():
    model = LSTM(3, 5, 2)
    inputs = torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match=r"state has batch size 3, input has batch size 2"):
        model(inputs, model.initial_state(3))
    with pytest.raises(TypeError, match=r"state is a NTMState, LSTMCell expects LSTMState"):
        model(inputs, NTM(3, 5, 2).initial_state(2))
    with pytest.raises(ValueError, match=r"state has hidden_size = 6, the model has 5"):
        model(inputs, LSTM(3, 6, 2).initial_state(2))
    with pytest.raises(TypeError, match=r"state is torch.float64 on cpu, the model's parameters"):
        model(inputs, model.initial_state(2).to(torch.float64))


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "output_size"])
def test_refused_sizes(name):
    with pytest.raises(ValueError, match=f"{name} is -1, expected at least 1"):
        LSTM(**{"input_size": 3, "hidden_size": 5, "output_size": 2, name: -1})
