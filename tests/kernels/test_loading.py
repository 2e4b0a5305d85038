"""Where kernels come from, and what happens where there are none."""

import os
import subprocess
import sys
import time
import warnings

import pytest
import torch

from sparsemem import kernels
from sparsemem.models.sam import SAM

MODEL = """
import sys, torch
from sparsemem import SAM
assert "numba" not in sys.modules, "import sparsemem imports Numba"
model = SAM(3, 6, 2, num_slots=20, slot_dim=4, num_heads=2, top_k=3)
assert "numba" not in sys.modules, "a model imports Numba"
"""
STEP = MODEL + "model(torch.randn(2, 4, 3))[0].sum().backward()\n"


def run_python(code, repository, **environment):
    """Output and errors of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(repository), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def small():
    torch.manual_seed(0)
    return SAM(3, 6, 2, num_slots=20, slot_dim=4, num_heads=2, top_k=3)


@pytest.fixture
def fresh():
    """Kernels are loaded anew, now and after the test."""
    kernels.load.cache_clear()
    yield
    kernels.load.cache_clear()


def test_numba_is_imported_when_a_step_needs_it(repository):
    pytest.importorskip("numba")
    run_python(STEP + "assert 'numba' in sys.modules", repository)


def test_the_switch_forces_the_reference(repository):
    code = STEP + "assert 'numba' not in sys.modules"
    run_python(code, repository, SPARSEMEM_KERNELS="reference")


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "numba")
    with pytest.raises(ValueError, match="SPARSEMEM_KERNELS is 'numba', expected one of auto, ref"):
        small()(torch.randn(2, 4, 3))


def test_without_numba_the_torch_code_runs_with_one_warning(repository):
    code = (
        "import sys; sys.modules['numba'] = None\n"
        + STEP.replace('"numba" not in sys.modules', "True")
        + "model(torch.randn(2, 4, 3))\n"
    )
    _, errors = run_python(code, repository)
    assert errors.count("RuntimeWarning") == 1
    assert "ModuleNotFoundError" in errors
    assert "several times slower" in errors


def test_a_failing_compilation_warns_once_and_gives_the_same(fresh, monkeypatch):
    input = torch.randn(2, 4, 3)
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    expected, _ = small()(input)
    monkeypatch.setenv("SPARSEMEM_KERNELS", "auto")

    def fail(dtype, links):
        raise OSError("no LLVM here")

    monkeypatch.setattr(kernels, "compile_for", fail)
    with pytest.warns(RuntimeWarning, match="OSError while compiling.*no LLVM here") as caught:
        output, state = small()(input)
    assert len(caught) == 1
    assert torch.equal(output, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small()(input, state)


def test_long_episodes_that_do_not_compile_warn_once_and_are_taken_step_by_step(monkeypatch):
    def fail(entries, dtype):
        raise OSError("no LLVM here")

    monkeypatch.setattr(kernels, "compile_all", fail)
    kernels.can_find.cache_clear()
    with pytest.warns(RuntimeWarning, match="are taken step by step.*no LLVM here") as caught:
        found = [kernels.can_find(torch.float32) for _ in range(2)]
    kernels.can_find.cache_clear()
    assert found == [False, False]
    assert len(caught) == 1


def test_what_is_kept_is_that_of_all_sources(monkeypatch, tmp_path):
    numba = pytest.importorskip("numba")
    from sparsemem.kernels import compiled

    def add(number):
        return number + 1

    def kept():
        function = compiled.kernel(add)
        assert function(1.5) == 2.5
        return sum(function.stats.cache_hits.values())

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert [kept(), kept()] == [0, 1]
    monkeypatch.setattr(compiled, "SOURCES", "others")
    assert [kept(), kept()] == [0, 1]


@pytest.mark.slow
def test_compiling_is_said_once_and_kept(repository, tmp_path):
    """A new cache folder stands for a new machine; numbers are what the kept code gives too."""
    pytest.importorskip("numba")
    code = STEP + "print(float(model.cell.interface.bias.grad.abs().sum()) > 0)"
    folder = str(tmp_path / "cache")
    _, errors = run_python(code, repository, NUMBA_CACHE_DIR=folder)
    assert "compiling the memory step" in errors
    start = time.perf_counter()
    output, errors = run_python(code, repository, NUMBA_CACHE_DIR=folder)
    assert output == "True\n"
    assert "compiling" not in errors, f"took {time.perf_counter() - start} s"
