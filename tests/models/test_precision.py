"""Models under autocast: half precision in the layers, none in the memory."""

import pytest
import torch

from sparsemem.bank import MemoryBank
from sparsemem.models.registry import find_model, make_model

SIZES = {"input_size": 3, "hidden_size": 6, "output_size": 2}
MEMORY = {"num_slots": 20, "slot_dim": 5, "num_heads": 2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def floats(tree):
    """The floating tensors of a nested state."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    parts = tree if isinstance(tree, tuple) else ()
    return [tensor for part in parts for tensor in floats(part)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sam", "sdnc", "dnc", "ntm", "lstm"])
def test_autocast_is_near_full_precision_and_leaves_the_state_in_it(name, device):
    model = make_model(name, **SIZES, **({} if name == "lstm" else MEMORY)).to(device)
    input = torch.randn(2, 8, 3, device=device)
    expected, _ = model(input)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with torch.autocast(device, torch.bfloat16):
        first, state = model(input[:, :4])
        assert {tensor.dtype for tensor in floats(state)} == {torch.float32}
        output = torch.cat([first, model(input[:, 4:], state)[0]], 1)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    for parameter, truth in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - truth).norm() <= 0.1 * truth.norm() + 0.02


@pytest.mark.parametrize("name", ["sam", "sdnc"])
def test_autocast_over_a_bank_computes_in_the_precision_of_its_rows(name):
    bank = MemoryBank(20, 5, initial="normal")
    model = find_model(name)(3, 6, 2, num_heads=2, memory=bank)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = model(torch.randn(2, 4, 3))
        output.float().sum().backward()
    assert state.episode.rows().dtype == torch.float32
    assert bank.keys.grad.dtype == torch.float32
    assert bank.keys.grad.to_dense().any()


@pytest.mark.parametrize("name", ["sam", "sdnc", "dnc", "ntm"])
def test_the_memory_is_not_computed_in_half_precision(name):
    """The same interface gives the same memory, bit for bit, with and without autocast."""
    cell = make_model(name, **SIZES, **MEMORY).cell
    hidden, values = torch.randn(2, 6), torch.randn(2, cell.interface.out_features)
    cell.controller.forward = lambda input, state: (hidden, (hidden, hidden))
    cell.interface.forward = lambda hidden: values
    state, fork = cell.initial_state(2), cell.initial_state(2)
    for _ in range(3):
        plain, state = cell(torch.zeros(2, 3), state)
        with torch.autocast("cpu", torch.bfloat16):
            features, fork = cell(torch.zeros(2, 3), fork)
        assert torch.equal(features, plain)


def test_input_of_a_layer_under_autocast_is_taken():
    model, layer = make_model("sam", **SIZES, **MEMORY), torch.nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(torch.randn(2, 5, 4))
        assert half.dtype == torch.bfloat16
        output, _ = model(half)
    torch.testing.assert_close(output.float(), model(half.float())[0], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("plain_errors")
def test_half_precision_input_without_autocast_is_refused():
    model = make_model("sam", **SIZES, **MEMORY)
    with pytest.raises(TypeError, match=r"input is torch\.bfloat16 on cpu, the model's parameters"):
        model(torch.zeros(2, 5, 3).bfloat16())
