"""The loop over time and the checks of `MemoryModel`."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sparsemem.models.base import Cell, MemoryModel
from sparsemem.models.registry import make_model

pytestmark = pytest.mark.usefixtures("plain_errors")


class SumState(NamedTuple):
    total: Tensor

    @property
    def batch_size(self):
        return len(self.total)


class SumCell(Cell):
    """Features are the sum of the inputs so far."""

    state_type = SumState

    def __init__(self, input_size):
        super().__init__()
        self.input_size = self.hidden_size = self.feature_size = input_size
        self.steps = 0

    def initial_state(self, batch_size):
        return SumState(torch.zeros(batch_size, self.input_size))

    def forward(self, input, state):
        self.steps += 1
        total = state.total + input
        return total, SumState(total)


@pytest.fixture
def model():
    model = MemoryModel(SumCell(3), 2)
    with torch.no_grad():
        model.output.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 10.0]]))
        model.output.bias.copy_(torch.tensor([0.0, 0.5]))
    return model


def test_loops_over_the_steps_and_applies_the_output_layer(model):
    inputs = torch.arange(12.0).view(2, 2, 3)
    output, state = model(inputs)
    assert output.tolist() == [[[0.0, 20.5], [3.0, 70.5]], [[6.0, 80.5], [15.0, 190.5]]]
    assert state.total.tolist() == [[3.0, 5.0, 7.0], [15.0, 17.0, 19.0]]
    again, state = model(inputs[:, :1], state)
    assert again.tolist() == [[[3.0, 90.5]], [[21.0, 270.5]]]


def test_sizes(model):
    assert model.input_size == 3
    assert model.output_size == 2
    assert model.initial_state(4).batch_size == 4


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3), (2, 0, 3), (0, 5, 3), (1, 2, 5, 3)])
def test_wrong_shape(model, shape):
    with pytest.raises(
        ValueError, match=r"input has shape .*, expected \[batch, steps, 3\]"
    ) as error:
        model(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert model.cell.steps == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16])
def test_wrong_dtype(model, dtype):
    with pytest.raises(
        TypeError,
        match=rf"input is {dtype} on cpu, the model's parameters are torch.float32 on cpu",
    ):
        model(torch.zeros(2, 5, 3, dtype=dtype))
    assert model.cell.steps == 0


def test_wrong_device(model):
    with pytest.raises(TypeError, match=r"input is torch.float32 on meta, .* torch.float32 on cpu"):
        model(torch.zeros(2, 5, 3, device="meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(model, value):
    inputs = torch.zeros(2, 5, 3)
    inputs[1, 3, 2] = value
    with pytest.raises(ValueError, match=rf"input\[1, 3, 2\] is {value}, expected finite values"):
        model(inputs)
    assert model.cell.steps == 0


def test_large_finite_values_whose_sum_overflows(model):
    inputs = torch.full((1, 2, 3), 3e38)
    inputs[0, 1] = -3e38
    output, _ = model(inputs)
    assert output[0, 1].tolist() == [0.0, 0.5]


def test_state_of_another_model(model):
    with pytest.raises(TypeError, match=r"state is a tuple, SumCell expects SumState"):
        model(torch.zeros(2, 1, 3), (torch.zeros(2, 3),))
    assert model.cell.steps == 0


def test_state_of_another_batch_size(model):
    with pytest.raises(ValueError, match=r"state has batch size 1, input has batch size 2"):
        model(torch.zeros(2, 1, 3), model.initial_state(1))
    assert model.cell.steps == 0


@pytest.mark.parametrize("value", [0, -1])
def test_size_too_small(model, value):
    with pytest.raises(ValueError, match=rf"output_size is {value}, expected at least 1"):
        MemoryModel(SumCell(3), value)
    with pytest.raises(ValueError, match=rf"batch_size is {value}, expected at least 1"):
        model.initial_state(value)


@pytest.mark.parametrize("value", [1.0, True, "2"])
def test_size_that_is_no_int(value):
    with pytest.raises(TypeError, match=rf"output_size is {value!r}, expected an int"):
        MemoryModel(SumCell(3), value)


@pytest.mark.parametrize("name", ["sam", "sdnc", "dnc", "ntm", "lstm"])
def test_a_state_that_moves_is_a_detached_copy(name):
    sizes = {} if name == "lstm" else {"num_slots": 6, "slot_dim": 4, "num_heads": 1}
    model = make_model(name, input_size=3, hidden_size=5, output_size=2, **sizes)
    _, state = model(torch.randn(2, 3, 3))
    copy = state.to(torch.float32)
    for ours, theirs in zip(floats(copy), floats(state), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
        assert ours.data_ptr() != theirs.data_ptr()
    assert all(tensor.dtype == torch.float64 for tensor in floats(state.to(torch.float64)))


def floats(tree):
    """The floating tensors of a nested state."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    parts = tree if isinstance(tree, tuple) else ()
    return [tensor for part in parts for tensor in floats(part)]
