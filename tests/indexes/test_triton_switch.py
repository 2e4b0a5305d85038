"""Which tensors Triton's kernels work on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemem.indexes import triton_switch
from sparsemem.indexes.triton_switch import SWITCH, use_triton

CPU = torch.zeros(1)


@pytest.fixture
def cuda():
    """A tensor that says it is on a GPU."""
    with FakeTensorMode():
        return torch.empty(1, device="cuda:0")


@pytest.fixture
def installed(monkeypatch):
    """installed(False): there is no Triton."""

    def choose(there, interprets=True):
        monkeypatch.setattr(triton_switch, "has_triton", lambda: there)
        monkeypatch.setattr(triton_switch, "interprets", lambda: there and interprets)

    choose(True)
    return choose


@pytest.mark.parametrize(
    ("choice", "on_cpu", "on_cuda"),
    [("auto", False, True), ("reference", False, False), ("triton", True, True)],
)
def test_by_device_and_choice(choice, on_cpu, on_cuda, cuda, installed, monkeypatch):
    monkeypatch.setenv(SWITCH, choice)
    assert use_triton(CPU) is on_cpu
    assert use_triton(cuda) is on_cuda
    assert use_triton(torch.zeros(1, device="meta")) is False


def test_without_triton_there_are_none(cuda, installed, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    installed(False)
    assert use_triton(cuda) is False
    assert use_triton(CPU) is False


def test_that_there_is_no_triton_for_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(triton_switch, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"Triton is not installed: .*sparsemem\[gpu\]"):
        assert not triton_switch.has_triton.__wrapped__()


def test_what_is_not_there_cannot_be_asked_for(monkeypatch):
    monkeypatch.setenv(SWITCH, "triton")
    monkeypatch.setattr(triton_switch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="is 'triton', expected Triton to be installed"):
        use_triton(CPU)


def test_on_the_cpu_it_has_to_interpret(installed, monkeypatch):
    monkeypatch.setenv(SWITCH, "triton")
    installed(True, interprets=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 in the environment before"):
        use_triton(CPU)


def test_another_choice_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "numba")
    with pytest.raises(ValueError, match="SPARSEMEM_KERNELS is 'numba', expected one of auto, ref"):
        use_triton(CPU)


@pytest.mark.parametrize(
    ("version", "there"), [("3.4.0", True), ("3.10.1+git1", True), ("4.0", True), ("3.3.1", False)]
)
def test_a_version_that_launches_otherwise_is_not_used(version, there, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    found = triton_switch.has_triton.__wrapped__
    if there:
        assert found()
    else:
        with pytest.warns(UserWarning, match="triton is 3.3.1, expected 3.4 or later"):
            assert not found()


def test_kernels_are_for_nvidia(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not triton_switch.has_triton.__wrapped__()
