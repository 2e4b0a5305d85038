"""What a sequence is taken step by step for, and what surfaces from it."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsemem.models.controller import LSTMController
from sparsemem.models.sam import SAMCell
from tests.kernels.comparing import F64, small

pytest.importorskip("numba")


def test_dropout_draws_as_step_by_step(form, taken):
    model, input = small(bypass_dropout=0.5), torch.randn(2, 12, 3, dtype=F64)

    def run():
        torch.manual_seed(0)
        output, _ = model(input)
        return output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))

    ours = run()
    assert taken == [0, 11]
    form("steps")
    torch.testing.assert_close(ours, run(), rtol=0, atol=1e-12)


def call_counter(calls):
    return lambda *_: calls.append(1)


def with_hook(model, part):
    calls = []
    part(model).register_forward_hook(call_counter(calls))
    return calls


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model.cell,
        lambda model: model.cell.controller,
        lambda model: model.cell.controller.cell,
        lambda model: model.cell.interface,
    ],
)
def test_hooks_are_called_at_every_step(part, form, taken):
    model, input = small(), torch.randn(2, 7, 3, dtype=F64)
    expected, _ = model(input)
    calls = with_hook(model, part)
    output, _ = model(input)
    assert taken[:2] == [0, 6], "without the hook"
    assert not any(taken[2:])
    assert len(calls) == 7
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_global_hooks_are_called_at_every_step(form, taken):
    model, calls = small(), []
    handle = nn.modules.module.register_module_forward_hook(call_counter(calls))
    try:
        model(torch.randn(2, 7, 3, dtype=F64))
    finally:
        handle.remove()
    assert not any(taken)
    assert len(calls) >= 7


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OtherCell(SAMCell):
    pass


class NoBias(LSTMController):
    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.cell = nn.LSTMCell(input_size, hidden_size, bias=False)


def without_bias(model):
    size = model.cell.controller.cell.input_size
    model.cell.controller.cell = nn.LSTMCell(size, 6, bias=False).double()


def other_controller(model):
    model.cell.controller = NoBias(model.cell.controller.cell.input_size, 6).double()


def interface_without_bias(model):
    model.cell.interface = nn.Linear(6, model.cell.interface.out_features, bias=False).double()


def parametrized(model):
    parametrize.register_parametrization(model.cell.interface, "weight", Doubled())


def other_forward(model):
    model.cell.interface.forward = lambda hidden: nn.Linear.forward(model.cell.interface, -hidden)


def other_class(model):
    model.cell.__class__ = OtherCell


@pytest.mark.parametrize(
    "change",
    [
        without_bias,
        other_controller,
        interface_without_bias,
        parametrized,
        other_forward,
        other_class,
    ],
)
def test_other_layers_are_called_step_by_step(change, form, taken):
    model, input = small(), torch.randn(2, 7, 3, dtype=F64)
    change(model)
    output, _ = model(input)
    assert not any(taken)
    form("reference")
    torch.testing.assert_close(output, model(input)[0], rtol=0, atol=1e-12)


def test_half_precision_layers_run_step_by_step(form, taken):
    model = small().float()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 5, 3))[0].sum().backward()
    assert not any(taken)


def test_reads_out_of_place_are_refused_by_the_step(form, taken, plain_errors):
    model = small()
    _, state = model(torch.randn(2, 5, 3, dtype=F64))
    read = state.read._replace(ids=state.read.ids + 40)
    with pytest.raises(ValueError, match="holds slot"):
        model(torch.randn(2, 5, 3, dtype=F64), state._replace(read=read))
    assert taken[-1] == 0


def test_a_wrong_controller_state_is_refused_by_the_controller(form, plain_errors):
    model = small()
    _, state = model(torch.randn(2, 5, 3, dtype=F64))
    hidden, cell = state.controller
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 3, dtype=F64), state._replace(controller=(hidden, cell[:1])))


@pytest.mark.parametrize("where", ["input", "weight"])
def test_not_a_number_surfaces_and_ids_stay_in_range(where, form, taken):
    model, state = small(num_slots=20), None
    _, state = model(torch.randn(2, 6, 3, dtype=F64))
    if where == "weight":
        model.cell.interface.weight.data[0, 0] = torch.inf
    else:
        model.cell.controller.cell.bias_ih.data[0] = torch.nan
    for _ in range(3):
        output, state = model(torch.randn(2, 6, 3, dtype=F64), state)
        for ids in (state.access.read_ids, state.access.write_ids):
            assert 0 <= int(ids.min()) <= int(ids.max()) < 20
    assert taken == [0, 5, 6, 6, 6]
    assert not output.isfinite().all()
    output.sum().backward()
