"""SAM and SDNC over a bank: equal to the same over a dense copy of it."""

import random

import pytest
import torch

from sparsemem.bank import MemoryBank
from sparsemem.models.sam import SAM
from sparsemem.models.sdnc import SDNC
from tests.oracles import dense_sam

F64 = torch.float64
MODELS = [SAM, SDNC]


def bank_of(rows, live=None, **options):
    """A bank with rows [N, W] where live."""
    bank = MemoryBank(*rows.shape, dtype=rows.dtype, **options)
    ids = torch.arange(len(rows)) if live is None else live.nonzero().flatten()
    if len(ids):
        bank.write(ids, rows[ids])
    return bank


def random_rows(draw, slots, width):
    """Rows of which some are equal, some multiples of others and some zero."""
    rows = torch.randn(slots, width, dtype=F64)
    for slot in range(slots):
        kind = draw.choice(["own", "own", "own", "equal", "multiple", "zero"])
        other = draw.randrange(slots)
        rows[slot] = {
            "own": rows[slot],
            "equal": rows[other],
            "multiple": rows[other] * draw.choice([0.3, 1.7]),
            "zero": torch.zeros(width, dtype=F64),
        }[kind]
    return rows


def random_case(model_class, seed):
    """A model over a bank, and an input: memories that overflow, equal rows, free slots."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    slots = draw.choice([2, 3, 5, 8, 40, 300])
    rows = random_rows(draw, slots, draw.randint(1, 6))
    live = torch.rand(slots) < draw.choice([0.0, 0.3, 0.8, 1.0])
    options = {
        "num_heads": draw.randint(1, min(4, slots)),
        "top_k": draw.choice([1, min(6, slots), min(slots, 8)]),
        "interpolation_bias": draw.choice([-4.0, 0.0, 2.0]),
    }
    if model_class is SDNC:
        options["num_links"] = draw.choice([1, 2, 8])
    model = model_class(3, 5, 2, memory=bank_of(rows, live), **options).double()
    for name, parameter in model.named_parameters():
        if "memory" not in name:
            parameter.data *= draw.choice([1, 3])
    shape = (draw.randint(1, 3), draw.randint(1, 24), 3)
    return model, rows, live, torch.randn(shape, dtype=F64, requires_grad=True)


def own_parameters(model):
    return [p for name, p in model.named_parameters() if "memory" not in name]


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=F64).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), inputs)
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]


def assert_close(ours, truth, tolerance=1e-9):
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("seed", range(60))
def test_equals_a_dense_copy_of_the_bank(model_class, seed):
    model, rows, live, input = random_case(model_class, seed)
    bank, before = model.cell.memory, model.cell.memory.keys.detach().clone()
    output, state = model(input)
    dense = rows.clone().requires_grad_()
    expected, end = dense_sam.run(model, input, dense, live)
    assert_close(output, expected)
    inputs = [input, *own_parameters(model)]
    ours, truth = gradients(output, [*inputs, bank.keys]), gradients(expected, [*inputs, dense])
    for gradient, of in zip(ours, truth, strict=True):
        assert_close(gradient, of)
    assert torch.equal(bank.keys.detach(), before), "copy-on-write: the bank is as it was"
    episode = state.episode
    for element, slots in enumerate(episode.slots):
        taken = slots[slots >= 0]
        assert len(taken) == state.touched[element] == len(set(taken.tolist()))
        memory = (rows * live[:, None]).index_copy(0, taken, episode.rows()[element, : len(taken)])
        assert_close(memory, end.memory[element].detach())
    order = end.last_access.sort(dim=1, stable=True).indices
    least = episode.slots_of(episode.least_recent(len(rows)))
    assert torch.equal(least, order)
