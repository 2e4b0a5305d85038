"""Models where the host does not see values: nothing waits inside a sequence, all stays on one
device, and the numbers are those of the CPU.
"""

import pytest
import torch

from sparsemem import devices
from sparsemem.bank import MemoryBank
from sparsemem.memory.store import EpisodeStore
from sparsemem.models.registry import find_model, make_model
from sparsemem.models.sdnc import SDNC
from tests.oracles.synchronisations import Synchronisations

F64 = torch.float64
SIZES = {"input_size": 3, "hidden_size": 6, "output_size": 2}
MEMORY = {"num_slots": 20, "slot_dim": 5, "num_heads": 2}
OPTIONS = {"masked": True, "dealloc_erase": True, "link_sharpening": True}
MODELS = [("sam", {}), ("sdnc", {}), ("ntm", {}), ("dnc", {}), ("dnc", OPTIONS)]


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")


@pytest.fixture
def device_form(monkeypatch, reference):
    """CPU tensors are taken for a device's."""
    monkeypatch.setattr(devices, "is_device", lambda tensor: True)


def model_of(name, **options):
    return make_model(name, **SIZES, **{**MEMORY, **options})


def trained(model, input):
    """Output and the gradients of all parameters."""
    model.zero_grad()
    output, _ = model(input)
    output.square().sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(ours, truth, tolerance):
    torch.testing.assert_close(ours[0].cpu(), truth[0], rtol=tolerance, atol=tolerance)
    for gradient, expected in zip(ours[1], truth[1], strict=True):
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(gradient.cpu(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.usefixtures("device_form")
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_a_sequence_waits_once_forward_and_backward(name, options):
    model, input = model_of(name, **options), torch.randn(2, 6, 3)
    with Synchronisations() as waits:
        output, state = model(input)
        output.square().sum().backward()
        state.detach()
        state.clone()
    assert waits.found == ["_local_scalar_dense"], "for whether the input is finite"
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("device_form")
@pytest.mark.parametrize("name", ["sam", "sdnc"])
def test_forks_and_later_calls_wait_for_their_input_only(name):
    model, input = model_of(name), torch.randn(2, 4, 3)
    _, state = model(input)
    with Synchronisations() as waits:
        fork = state.clone()
        (model(input, state)[0].sum() + model(input, fork)[0].sum()).backward()
    assert waits.found == ["_local_scalar_dense"] * 2


@pytest.mark.usefixtures("device_form")
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_a_captured_sequence_waits_for_nothing(name, options, monkeypatch):
    monkeypatch.setattr(devices, "is_capturing", lambda tensor: True)
    model = model_of(name, **{**options, "num_slots": 100})
    steps = 30 if name in ("sam", "sdnc") else 4  # the table grows, where there is one
    with Synchronisations() as waits:
        model(torch.randn(2, steps, 3))[0].sum().backward()
    assert waits.found == []


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_all_that_a_model_makes_is_on_its_device(name, options, monkeypatch):
    """Meta tensors stand for another device's: they have no values to look at either."""
    monkeypatch.setattr(devices, "is_capturing", lambda tensor: True)
    model = model_of(name, **options).to("meta")
    input = torch.randn(2, 6, 3, device="meta")
    with Synchronisations() as waits:
        output, state = model(input)
        output.sum().backward()
        state.detach()
        state.clone()
    assert waits.found == []
    assert {parameter.grad.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sam", "sdnc"])
@pytest.mark.parametrize("num_slots", [9, 2**40])
def test_the_device_form_computes_what_the_cpu_does(name, num_slots, monkeypatch, reference):
    """Nine slots are used up after four steps of 40."""
    model, input = model_of(name, num_slots=num_slots).to(F64), torch.randn(3, 40, 3, dtype=F64)
    truth = trained(model, input)
    monkeypatch.setattr(devices, "is_device", lambda tensor: True)
    assert_same(trained(model, input), truth, 1e-12)


@pytest.mark.usefixtures("device_form")
def test_wide_reads_of_few_slots_are_not_waited_for_at_every_step(monkeypatch):
    """A step's bound grows by H + K, what is touched by less: the slack is of several steps."""
    waits = []
    exact = EpisodeStore.exact_extent
    monkeypatch.setattr(EpisodeStore, "exact_extent", lambda self: waits.append(1) or exact(self))
    model = SDNC(4, 8, 4, num_slots=100_000, slot_dim=4, num_heads=1, top_k=16)
    model(torch.randn(1, 40, 4))
    assert len(waits) <= 5


@pytest.mark.usefixtures("device_form")
def test_a_state_moves_to_the_cpu_and_back(monkeypatch):
    model, input = model_of("sam", num_slots=9).to(F64), torch.randn(2, 30, 3, dtype=F64)
    whole, _ = model(input)
    first, state = model(input[:, :10])
    monkeypatch.setattr(devices, "is_device", lambda tensor: False)
    second, state = model(input[:, 10:20], state.to("cpu"))
    monkeypatch.setattr(devices, "is_device", lambda tensor: True)
    third, _ = model(input[:, 20:], state.to("cpu"))
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole, rtol=0, atol=1e-12)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["sam", "sdnc", "ntm", "dnc"])
def test_a_model_on_a_gpu_equals_itself_on_the_cpu(name, dtype, device, monkeypatch):
    model, input = model_of(name).to(dtype), torch.randn(2, 20, 3, dtype=dtype)
    with monkeypatch.context() as patched:
        patched.setenv("SPARSEMEM_KERNELS", "reference")  # spares compiling the CPU's kernels
        truth = trained(model, input)
    ours = trained(model.to(device), input.to(device))
    assert ours[0].device.type == device
    assert_same(ours, truth, 1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options", "switch"),
    [
        *((*model, "auto") for model in MODELS),
        *((name, {}, "reference") for name in ("sam", "sdnc")),
    ],
)
def test_nothing_waits_on_a_gpu(name, options, switch, device, monkeypatch):
    """By torch's own watch, which is told of each wait; it sees backward threads too."""
    monkeypatch.setenv("SPARSEMEM_KERNELS", switch)
    monkeypatch.setattr("sparsemem.models.base.check_finite", lambda name, tensor: None)
    model = model_of(name, **options).to(device)
    input = torch.randn(2, 6, 3, device=device)
    model(input)[0].sum().backward()  # libraries wait when they are first used
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, state = model(input)
        output.sum().backward()
        state.detach()
        state.clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sam", "sdnc"])
def test_a_sparse_model_on_a_gpu_with_its_slots_used_up(name, device):
    """Nine slots, 60 steps; the state goes to the CPU and comes back, its forks give gradients."""
    model, input = model_of(name, num_slots=9).to(F64), torch.randn(2, 60, 3, dtype=F64)
    truth, _ = model(input)
    model, input = model.to(device), input.to(device)
    first, state = model(input[:, :20])
    fork = state.clone()
    second, state = model(input[:, 20:40], state.to(device))
    other = model(input[:, 20:40], fork)[0]
    ours, state = torch.cat([first, second], 1).cpu(), state.to("cpu")
    third, _ = model.cpu()(input[:, 40:].cpu(), state)
    torch.testing.assert_close(torch.cat([ours, third], 1), truth, rtol=0, atol=1e-8)
    torch.testing.assert_close(other, second, rtol=0, atol=1e-8)


@pytest.mark.gpu
def test_forks_on_a_gpu_give_the_gradients_of_the_cpu(device):
    model, input = model_of("sam").to(F64), torch.randn(2, 12, 3, dtype=F64)

    def forked(input):
        model.zero_grad()
        _, state = model(input[:, :4])
        fork = state.clone()
        (model(input[:, 4:8], state)[0].sum() + model(input[:, 8:], fork)[0].sum()).backward()
        # Copies: the model's own gradients move with it.
        return [parameter.grad.cpu().clone() for parameter in model.parameters()]

    truth = forked(input)
    model.to(device)
    for ours, expected in zip(forked(input.to(device)), truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sam", "sdnc"])
def test_a_model_over_a_bank_on_a_gpu_equals_itself_on_the_cpu(name, device):
    bank = MemoryBank(20, 5, initial="normal", dtype=F64, seed=3)
    model = find_model(name)(3, 6, 2, num_heads=2, memory=bank).to(F64)
    input = torch.randn(2, 8, 3, dtype=F64)

    def run(input):
        model.zero_grad()
        output, _ = model(input)
        output.square().sum().backward()
        return output.detach().cpu(), bank.keys.grad.to_dense().cpu()

    truth = run(input)
    model.to(device)
    for ours, expected in zip(run(input.to(device)), truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)


@pytest.mark.gpu
def test_memory_of_a_gpu_does_not_grow_from_call_to_call(device):
    model = model_of("sam", num_slots=2**40).to(device)
    input, held = torch.randn(2, 30, 3, device=device), []
    for _ in range(3):
        model.zero_grad()
        output, state = model(input)
        output.sum().backward()
        del output, state
        held.append(torch.cuda.memory_allocated(device))
    assert held[1] == held[2]
