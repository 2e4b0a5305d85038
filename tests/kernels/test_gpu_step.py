"""Steps by Triton's kernels against the torch code that they stand in for, and the dense oracle.

Kernels are compiled for each of SIZES and for each dtype, which takes seconds on a GPU: there only
those in ON_GPU are run.
"""

import pytest
import torch

from sparsemem import devices
from sparsemem.kernels import fused
from sparsemem.memory import episode
from sparsemem.memory.episode import Episode
from sparsemem.models.sam import SAM, SAMCell
from sparsemem.models.sdnc import SDNC
from tests.kernels.comparing import F32, F64, everything, ids_of
from tests.oracles import dense_sam
from tests.oracles.synchronisations import Synchronisations

MODELS = [SAM, SDNC]
TOLERANCE = {F32: 1e-4, F64: 1e-10}
SIZES = [  # heads, K, W, slots (few: they are used up), dtype
    (2, 3, 5, 4, F64),
    (1, 1, 32, 3, F64),
    (4, 4, 17, 9, F64),
    (3, 3, 16, 7, F32),
]
ON_GPU = [SIZES[0], SIZES[3]]


@pytest.fixture
def switch(triton_device, monkeypatch):
    """switch(True): steps are by kernels from here on; switch(False): the torch code runs.

    On the CPU, too, the store is in its form for devices. Each step is taken by itself.
    """
    monkeypatch.setattr(SAMCell, "sequence", lambda *_: None)
    on_cpu = triton_device.type == "cpu"
    if on_cpu:
        monkeypatch.setattr(devices, "is_device", lambda tensor: True)

    def choose(on):
        chosen = ("triton" if on_cpu else "auto") if on else "reference"
        monkeypatch.setenv("SPARSEMEM_KERNELS", chosen)

    choose(True)
    return choose


@pytest.fixture
def taken(monkeypatch):
    """For each step of a model whether it was fused."""
    record = []

    def take_step(*arguments):
        step = fused.take_step(*arguments)
        record.append(step is not None)
        return step

    monkeypatch.setattr(episode, "take_step", take_step)
    return record


def case(model_class, sizes, device, steps, batch=2, slots=None, scale=1.0):
    """A model and an input; weights so small that recurrence does not blow rounding up."""
    heads, top_k, width, few, dtype = sizes
    if device.type == "cuda" and sizes not in ON_GPU:
        pytest.skip("takes long to compile")
    torch.manual_seed(heads + steps)
    options = {"num_links": 3} if model_class is SDNC else {}
    model = model_class(
        3, 6, 2, num_slots=slots or few, slot_dim=width, num_heads=heads, top_k=top_k,
        interpolation_bias=0.0, strength_bias=2.0, **options,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= scale
    input = torch.randn(batch, steps, 3, dtype=dtype)
    return model.to(device, dtype), input.to(device).requires_grad_()


def assert_equal_runs(model, input, run, truth, dtype):
    """Outputs, gradients, memory and its order of two runs, each an output and a state."""
    ours, expected = everything(model, input, *run), everything(model, input, *truth)
    for name, value in expected.items():
        tolerance = TOLERANCE[dtype] * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    for a, b in zip(ids_of(run[1]), ids_of(truth[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference(model_class, sizes, triton_device, switch, taken):
    """Few slots: rows are used again, heads meet at one row."""
    model, input = case(model_class, sizes, triton_device, 3)
    run = model(input)
    assert taken == [True] * 3
    switch(False)
    truth = model(input)
    assert not any(taken[3:])
    assert_equal_runs(model, input, run, truth, sizes[-1])


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("base", [0.0, 0.25])
def test_equals_the_dense_transcription(model_class, base, triton_device, switch, taken):
    model, input = case(model_class, SIZES[0], triton_device, 3, slots=6)
    start = model.cell.initial_state(2)
    options = {"base": base, "device": triton_device, "dtype": F64}
    output, state = model(input, start._replace(episode=Episode.start(2, 6, 5, **options)))
    assert all(taken)
    parts, weights = [input, *model.parameters()], torch.randn_like(output)
    ours = torch.autograd.grad((output * weights).sum(), parts)
    model, input = model.cpu(), input.detach().cpu().requires_grad_()
    expected, dense = dense_sam.run(model, input, rows=torch.full((6, 5), base, dtype=F64))
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-9, atol=1e-9)
    parts = [input, *model.parameters()]
    truth = torch.autograd.grad((expected * weights.cpu()).sum(), parts)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)
    rows = state.episode.rows().cpu()
    torch.testing.assert_close(rows, dense.memory[:, : rows.shape[1]].detach())


@pytest.mark.parametrize("model_class", MODELS)
def test_forks_cuts_and_a_change_of_code_on_the_way(model_class, triton_device, switch, taken):
    model, input = case(model_class, SIZES[0], triton_device, 2, batch=1)

    def run(*by_kernels):
        losses, state = [], None
        for chunk, on in enumerate(by_kernels):
            switch(on)
            output, state = model(input + chunk, state)
            losses.append(output.square().sum())
            if chunk == 0:
                other, fork = model(input.flip(1), state.clone())
                losses.append(other.sum())
        losses.append(model(input, fork.detach())[0].sum())
        parts = [input, *model.parameters()]
        gradients = torch.autograd.grad(sum(losses), parts, retain_graph=True)
        again = torch.autograd.grad(sum(losses), parts)
        torch.testing.assert_close(again, gradients, rtol=1e-12, atol=1e-12)
        return [loss.detach() for loss in losses], gradients, state.episode.rows()

    ours = run(True, False, True)
    assert taken == [True] * 4 + [False] * 2 + [True] * 4
    for a, b in zip(ours, run(False, False, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_class", MODELS)
def test_many_rows_are_gone_through_piece_by_piece(
    model_class, triton_device, switch, taken, monkeypatch
):
    """Searched in parts, too, and with elements that have touched different numbers of rows."""
    model, input = case(model_class, SIZES[0], triton_device, 4, slots=1000)
    with torch.no_grad():
        input[1] = 0
    if triton_device.type == "cpu":
        pytest.importorskip("triton")
        from sparsemem.kernels.gpu import step

        monkeypatch.setattr(step, "TILE", 32)
        monkeypatch.setattr(step, "SCAN", 8)
        monkeypatch.setattr(step, "parts_of", lambda rows, searches: 3)
    run = model(input)
    assert all(taken)
    switch(False)
    assert_equal_runs(model, input, run, model(input), F64)


def test_parts_may_hold_fewer_rows_than_are_read(triton_device, switch, taken, monkeypatch):
    """33 rows in 40 parts, whose keys are gone through 16 parts at once."""
    from sparsemem.kernels.gpu import step

    model, input = case(SAM, (1, 32, 5, 50, F64), triton_device, 2, batch=1)
    monkeypatch.setattr(step, "parts_of", lambda rows, searches: 40)
    run = model(input)
    assert all(taken)
    switch(False)
    assert_equal_runs(model, input, run, model(input), F64)


def test_long_searches_are_divided():
    pytest.importorskip("triton")
    from sparsemem.kernels.gpu.step import parts_of

    assert [parts_of(rows, 32) for rows in (4, 511, 512, 10**6)] == [1, 1, 2, 32]
    assert parts_of(10**6, 5000) == 1, "there is enough to do"


def test_a_search_in_parts_finds_the_same(triton_device, switch, monkeypatch):
    """As they are found on a device: rows of many equal scores, and some better ones."""
    from sparsemem.kernels.gpu import step

    heads, top_k, width, _, dtype = SIZES[0]
    memory = Episode.start(2, 5000, width, device=triton_device, dtype=dtype)._store
    memory.reserve(200)
    memory.touched, memory.extent = torch.tensor([190, 30], device=triton_device), 190
    rows = torch.randint(-1, 2, memory.rows.shape, device=triton_device).to(dtype)
    rows[0, 190:], rows[1, 30:] = 0, 0
    memory.rows.copy_(rows)
    memory.norms.copy_((rows.square().sum(-1) + 1e-6).rsqrt())
    values = torch.randn(2, heads * (2 * width + 3), device=triton_device, dtype=dtype)
    sizes = step.Sizes(dtype, heads, 2 * width + 3, width, top_k, False)
    expected = memory.search(values.view(2, heads, -1)[:, :, :width], top_k)
    for parts in (1, 2, 7):
        monkeypatch.setattr(step, "parts_of", lambda rows, searches, parts=parts: parts)
        keys = step.search_step(sizes, memory, values, memory.touched)
        best = keys.flatten(2).sort(2, descending=True).values[:, :, :top_k]
        assert torch.equal(2**31 - 1 - best % 2**31, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("model_class", MODELS)
def test_not_a_number_surfaces_and_ids_stay_in_range(
    model_class, where, triton_device, switch, taken
):
    model, input = case(model_class, SIZES[3], triton_device, 2, batch=1, slots=20)
    _, state = model(input[:, :1])
    if where == "weight":
        model.cell.interface.weight.data[0, 0] = torch.inf
    else:
        model.cell.controller.cell.bias_ih.data[0] = torch.nan
    output, state = model(input, state)
    for ids in (state.access.read_ids, state.access.write_ids):
        assert 0 <= int(ids.min()) <= int(ids.max()) < 20
    assert not output.isfinite().all()
    output.sum().backward()
    assert all(taken)


@pytest.mark.parametrize("model_class", MODELS)
def test_nothing_waits_and_the_result_is_the_same_every_time(
    model_class, triton_device, switch, taken
):
    model, input = case(model_class, SIZES[0], triton_device, 2, batch=1)
    runs = []
    for _ in range(2):
        with Synchronisations() as waits:
            output, _ = model(input)
            runs.append(torch.autograd.grad(output.sum(), [input, *model.parameters()]))
        assert waits.found == ["_local_scalar_dense"], "for whether the input is finite"
    assert all(taken)
    assert all(map(torch.equal, *runs))


def test_other_dtypes_take_the_torch_code(triton_device, switch, taken):
    model = SAM(3, 6, 2, num_slots=20, slot_dim=4, num_heads=1, top_k=3).to(triton_device)
    model.bfloat16()(torch.randn(2, 3, 3, device=triton_device).bfloat16())
    assert taken == [False] * 3


def test_more_than_a_program_takes_is_left_to_torch(triton_device, taken):
    memory = {"num_slots": 400, "slot_dim": 2, "num_heads": 1, "top_k": 200}
    model = SAM(3, 4, 2, **memory).to(triton_device)
    output, _ = model(torch.randn(1, 3, 3, device=triton_device))
    assert taken == [False] * 3
    assert output.isfinite().all()
