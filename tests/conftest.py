"""Shapes in public signatures are executed: every sparsemem function is type-checked in tests."""

import jaxtyping
import pytest

_hook = jaxtyping.install_import_hook("sparsemem", "beartype.beartype")

import torch  # noqa: E402


@pytest.fixture
def plain_errors():
    """Let bad arguments through the shape checker, to reach the library's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _deterministic_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)
