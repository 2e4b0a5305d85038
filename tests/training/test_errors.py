import numpy as np
import pytest
import torch

from sparsemem.training.errors import ConfigError, memory_explained


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(2**60),
        lambda: torch.empty(2**62, 2**62),
        lambda: torch.empty(10**30),
        lambda: np.empty(2**50),
        lambda: np.empty(2**60),
        lambda: float(10**400),
        lambda: bytes(2**62),
    ],
)
def test_what_does_not_fit_in_memory_is_one_line(ask):
    with (
        pytest.raises(ConfigError, match=r"^the config does not fit in memory: \S.*$") as error,
        memory_explained(),
    ):
        ask()
    assert len(str(error.value).splitlines()) == 1


def test_a_full_gpu_is_one_too():
    with pytest.raises(ConfigError, match="memory: CUDA out of memory"), memory_explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), memory_explained():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(ValueError, match=r"^no$"), memory_explained():
        raise ValueError("no")
