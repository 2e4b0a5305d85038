"""What all tests share: checks of types, seeds, devices, Triton's interpreter, real data."""

import os
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

from tests import interpreter
from tests.checking import sampler

sampler.install("sparsemem")

import torch  # noqa: E402

from sparsemem.kernels.threads import use_threads  # noqa: E402

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:  # Triton's kernels run in its interpreter, which is chosen when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent

# Times vary too much on shared machines for a deadline on single examples.
hypothesis.settings.register_profile("sparsemem", deadline=None)
hypothesis.settings.load_profile("sparsemem")


@pytest.fixture
def plain_errors():
    """Let bad arguments through the shape checker, to reach the library's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _deterministic_start():
    sampler.new_test()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    use_threads(None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Devices that everything works on."""
    if request.param == "cuda" and not HAS_CUDA:
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def _triton():
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    if not HAS_CUDA:
        interpreter.mend()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request, monkeypatch, _triton) -> torch.device:
    """A device that Triton's kernels run on: the CPU by their interpreter, or else a GPU."""
    if (request.param == "cuda") != HAS_CUDA:
        pytest.skip("needs a GPU" if request.param == "cuda" else "kernels are compiled here")
    if request.param == "cpu":
        monkeypatch.setenv("SPARSEMEM_KERNELS", "triton")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets: SPARSEMEM_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("SPARSEMEM_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if named and not folder.is_dir():
        # A wrong name must not look like a machine without the data.
        pytest.fail(f"SPARSEMEM_DATA is {named!r}, expected an existing folder")
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets: SPARSEMEM_DATA is not set, {folder} does not exist")
    return folder
