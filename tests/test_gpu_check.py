"""scripts/gpu_check, without a GPU: what it would do, and that its parts run, on tiny sizes."""

import json
import os
import subprocess
import sys

import pytest

PARTS = ("environment", "tests", "models", "banks", "ivf", "tuning")
LONG = PARTS[1:]  # also with tiny sizes: seconds each, most of them to import torch


@pytest.fixture
def script(repository):
    def run(*arguments):
        line = [repository / "scripts/gpu_check", *arguments]
        env = os.environ | {"PYTHON": sys.executable}
        return subprocess.run(line, capture_output=True, text=True, env=env, timeout=250)

    return run


@pytest.fixture
def benchmarks(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return repository / "benchmarks"


def test_a_dry_run_lists_the_parts_and_writes_nothing(script, tmp_path):
    out = tmp_path / "out"
    done = script("--dry-run", "--out", out, "--minutes", "4")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    assert "parts in 4 minutes" in done.stdout
    for name in PARTS:
        assert f"\n{name}: " in done.stdout


def test_a_quick_dry_run_has_the_first_parts(script):
    done = script("--dry-run", "--quick")
    assert "3 parts in 2 minutes" in done.stdout
    assert "gpu_banks" not in done.stdout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in PARTS]
)
def test_parts_run_on_tiny_sizes(script, tmp_path, name):
    done = script("--device", "cpu", "--tiny", "--only", name, "--out", tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    part = report["parts"][name]
    errors = {key: f["error"] for key, f in part["figures"].items() if "error" in f}
    assert not errors
    assert part["status"] == "done"
    assert done.returncode == 0, done.stderr
    assert part["figures"]
    assert f"## {name}" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / f"{name}.log").stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 3


BROKEN = """
from gpu_common import options, Results
given = options("")
results = Results(given.results, given.seconds)
def fails(): raise ValueError("not so bad")
def breaks(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def dies(): import os, signal; os.kill(os.getpid(), signal.SIGSEGV)
results.run("first", lambda: {"value": 1})
results.run("second", fails)
results.run("third", breaks)
results.run("fourth", dies)
results.run("fifth", lambda: {"value": 5})
"""


@pytest.fixture
def run_part(benchmarks, tmp_path, monkeypatch):
    """A part with a script of its own, which may take some seconds."""
    import gpu_check

    def run(script, seconds):
        (tmp_path / "part.py").write_text(script)
        part = gpu_check.Part("part", str(tmp_path / "part.py"), "nothing", 1.0, 60)
        end = gpu_check.time.monotonic() + seconds
        return gpu_check.run_part(part, gpu_check.arguments(), tmp_path / "results.json", end)

    monkeypatch.setattr(gpu_check, "HERE", benchmarks)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(tmp_path)])
    return run


def test_a_part_that_breaks_goes_on_behind_what_broke_it(run_part):
    import gpu_check

    found = run_part(BROKEN, 200)
    figures = found["figures"]
    assert found["status"] == "done"
    assert figures["first"]["value"] == 1
    assert figures["second"]["error"] == "ValueError: not so bad"
    assert "illegal memory access" in figures["third"]["error"]
    assert "ended in the middle" in figures["fourth"]["error"]
    assert figures["fifth"]["value"] == 5
    assert not gpu_check.is_good(found)


def test_a_part_is_stopped_at_its_time(run_part, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "LEAST", 0.0)
    found = run_part("import time; time.sleep(60)", 1.5)
    assert found["status"].startswith("stopped after")
    assert found["seconds"] < 30
    assert not gpu_check.is_good(found)


def test_a_test_that_failed_is_not_good(benchmarks):
    import gpu_check

    part = {"status": "done", "figures": {"pytest": {"passed": 3, "failed": 1, "skipped": 0}}}
    assert not gpu_check.is_good(part)
    part["figures"]["pytest"]["failed"] = 0
    assert gpu_check.is_good(part)


TESTS = """
import pytest
@pytest.mark.gpu
def test_good(): pass
@pytest.mark.gpu
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.gpu
def test_left_out(): pytest.skip("needs more")
def test_other(): raise AssertionError("not for a GPU")
"""


def test_each_test_is_reported_with_its_message(benchmarks, tmp_path):
    import gpu_tests

    (tmp_path / "test_some.py").write_text(TESTS)
    given = gpu_tests.Options(tiny=True, faiss=None)
    cases = gpu_tests.run([str(tmp_path / "test_some.py")], given, 60.0)
    by_name = {name.split("::")[-1]: case for name, case in cases.items()}
    assert {name: case["kind"] for name, case in by_name.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_left_out": "skipped",
    }
    assert "one is not two" in by_name["test_bad"]["message"]
    assert by_name["test_left_out"]["message"] == "Skipped: needs more"


def test_files_with_gpu_tests_are_found(benchmarks):
    import gpu_tests

    found = gpu_tests.files(tiny=False)
    assert "tests/models/test_captured.py" in found
    assert "tests/tasks/test_copying.py" not in found
