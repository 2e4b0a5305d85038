"""What the tests of kernels compare, and how closely."""

import random

import torch

from sparsemem.models.sam import SAM
from sparsemem.models.sdnc import SDNC

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-12}


def random_case(model_class, seed, dtype, scales=(0.3, 1)):
    """Sizes odd and even, laps that end, K = N, gates open and shut, overlays that grow."""
    draw = random.Random(seed)
    slots = draw.choice([2, 3, 5, 8, 40, 1000])
    options = {
        "num_slots": slots,
        # In one dimension all cosines are nearly 1, too near for float32 to tell some apart.
        "slot_dim": draw.choice([1, 2, 5, 8, 16, 33] if dtype == F64 else [4, 5, 8, 16, 33]),
        "num_heads": draw.randint(1, min(5, slots)),
        "top_k": min(slots, draw.choice([1, 2, 3, 4, 7, 8])),
        "interpolation_bias": draw.choice([-4.0, 0.0, 2.0]),
        "strength_bias": draw.choice([0.0, 8.0, 25.0]),
    }
    if model_class is SDNC:
        options["num_links"] = draw.choice([1, 2, 8])
    torch.manual_seed(seed)
    model = model_class(3, 5, 2, **options).to(dtype)
    for parameter in model.parameters():
        parameter.data *= draw.choice(scales)
    steps = draw.randint(1, 30) if dtype == F64 else draw.randint(1, 8)
    return model, torch.randn(draw.randint(1, 4), steps, 3, dtype=dtype, requires_grad=True)


def everything(model, input, output, state):
    """Numbers that a run leaves, by name: outputs, gradients, memory."""
    like = {"dtype": output.dtype, "device": output.device}
    weights = torch.linspace(-1, 1, output.numel(), **like).view_as(output)
    inputs = [input, *model.parameters()]
    gradients = torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True)
    return {
        "output": output.detach(),
        "reads": state.reads.detach(),
        "rows": state.episode.rows(),
        "read_weights": state.access.read_weights,
        "write_weights": state.access.write_weights.detach(),
        **{f"gradient_{i}": gradient for i, gradient in enumerate(gradients)},
    }


def ids_of(state):
    """Ids and counts that a run leaves, which have to be equal."""
    count = min(state.episode.num_slots, state.episode.extent + 3)
    order = state.episode.least_recent(count)
    return [state.access.read_ids, state.access.write_ids, state.touched, order]


def assert_same(ours, truth, dtype):
    for name, value in truth.items():
        scale = float(value.abs().max()) if value.numel() else 1.0
        error = float((ours[name] - value).abs().max()) if value.numel() else 0.0
        assert ours[name].shape == value.shape, name
        assert error <= TOLERANCE[dtype] * max(scale, 1.0), f"{name}: {error} of {scale}"


def small(**options):
    """A SAM, always the same."""
    torch.manual_seed(3)
    sizes = {"num_slots": 40, "slot_dim": 5, "num_heads": 2, "top_k": 3, **options}
    return SAM(3, 6, 2, **sizes).double()
