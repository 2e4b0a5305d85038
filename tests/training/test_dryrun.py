import pytest
import torch

from sparsemem.bench.measuring import tensor_peak
from sparsemem.models.registry import make_model, model_options
from sparsemem.training.dryrun import (
    AllocationMeter,
    Pass,
    StepSizes,
    doubled,
    grown,
    linear,
    memory_bytes,
    optimiser_bytes,
    run_pass,
    step_bytes,
)

SIZES = {
    "input_size": 5,
    "output_size": 3,
    "hidden_size": 20,
    "num_slots": 48,
    "slot_dim": 8,
    "num_heads": 2,
    "top_k": 3,
}


def model_of(name, device="cpu", **changes):
    known = model_options(name)
    with torch.device(device):
        return make_model(name, **{k: v for k, v in {**SIZES, **changes}.items() if k in known})


def measured(model, batch, steps):
    """What the profiler counts of a pass, gradients of an earlier one included."""

    def work():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        output, _ = model(torch.zeros(batch, steps, 5))
        for parameter in model.parameters():
            parameter.grad = None
        output.square().mean().backward()

    work()
    for parameter in model.parameters():
        parameter.grad = None
    return tensor_peak(work)


def test_the_meter_counts_what_is_alive_and_not_views_nor_what_was_there():
    there = torch.zeros(1000, dtype=torch.uint8)
    with AllocationMeter([there]) as meter:
        one = torch.empty(100, dtype=torch.uint8)
        view = one[10:]
        there.add_(1)
        assert meter.alive == 100
        del one
        assert meter.alive == 100, "the view still holds it"
        two = torch.empty(50, dtype=torch.uint8)
        del view
        assert (meter.alive, meter.peak) == (50, 150)
        del two
    assert meter.alive == 0


@pytest.mark.parametrize("name", ["lstm", "ntm", "dnc"])
@pytest.mark.parametrize("steps", [6, 16])
def test_a_run_without_data_takes_what_a_real_one_does(name, steps):
    dry = step_bytes(model_of(name, "meta"), StepSizes(3, steps, steps))
    assert sum(dry) == pytest.approx(measured(model_of(name), 3, steps), rel=0.1)


@pytest.mark.parametrize("name", ["sam", "sdnc"])
@pytest.mark.parametrize(("batch", "steps"), [(8, 12), (8, 30), (20, 20)])
def test_a_short_run_tells_what_a_long_one_takes(name, batch, steps):
    model = model_of(name, num_slots=2**20)
    dry = step_bytes(model, StepSizes(batch, steps, steps))
    assert sum(dry) == pytest.approx(measured(model, batch, steps), rel=0.2)


def test_nothing_of_the_sizes_is_allocated():
    model = model_of("ntm", "meta", num_slots=2**24)
    assert step_bytes(model, StepSizes(1000, 4, 4)).rest > 1000 * 4 * 2**24 * 8 * 4


def test_without_gradients_activations_are_not_kept():
    model = model_of("ntm", "meta")
    kept = step_bytes(model, StepSizes(3, 30, 30)).rest
    assert step_bytes(model, StepSizes(3, 30, 30), training=False).rest < kept / 10


def test_the_memory_of_touched_slots_is_added_up():
    sam = model_of("sam", num_slots=2**20).cell
    row = 2 * 8 * 4 + 4 + 8  # a row of 8 float32, its gradient, its norm, its last access
    assert memory_bytes(sam, 5, Pass(0, touched=40, capacity=64)) == 5 * 64 * row
    indexed = Pass(0, touched=10_000, capacity=16_384)
    tree = 3 * 10_000 * (8 + 8) + 16_384 * 8  # codes and ids with room to spare; places
    assert memory_bytes(sam, 1, indexed) == 16_384 * row + tree
    links = 2 * 2 * 7 * 8 * (8 + 4)  # tables, heads, rows, links of a row, id and weight
    sdnc = model_of("sdnc", num_slots=2**20).cell
    assert memory_bytes(sdnc, 1, Pass(0, 5, 64, links=7)) == 64 * row + links
    assert memory_bytes(model_of("ntm").cell, 5, Pass(0)) == 0


def test_a_memory_goes_on_growing_as_it_did():
    sam = model_of("sam", num_slots=1000).cell
    later = grown(sam, Pass(1, touched=40, capacity=64, links=7), 10, 50)
    assert later == Pass(1, touched=200, capacity=256, links=224)
    assert grown(sam, later, 50, 10_000)[1:3] == (1000, 1000), "there are no more slots"


def test_a_pass_says_how_far_its_memory_has_grown():
    run = run_pass(model_of("sam", num_slots=2**20), 2, 10)
    assert 20 <= run.touched <= 10 * (2 + 3)  # two heads write, three rows are read
    assert (run.capacity, run.links) == (64, 0)


def test_capacities_double_and_lines_go_on():
    assert [doubled(64, n) for n in (3, 64, 65, 600)] == [64, 64, 128, 1024]
    assert doubled(0, 5) == 0
    assert linear((1, 3), (10.0, 14.0), 6) == 20.0


@pytest.mark.parametrize(
    ("optimiser", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 1),
        (lambda p: torch.optim.Adam(p, lr=1e-3), 2),
        (lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True), 3),
    ],
)
def test_an_optimiser_s_state_is_added_up(optimiser, copies):
    model = model_of("lstm", "meta")
    held = sum(parameter.nbytes for parameter in model.parameters())
    state, temporary = optimiser_bytes(optimiser(model.parameters()), model)
    steps = 4 * len(list(model.parameters()))  # Adam counts its steps for each
    assert copies * held <= state <= copies * held + steps
    assert 0 <= temporary <= 2 * held
