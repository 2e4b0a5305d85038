"""scripts/gpu_check, without a GPU: what it would do, and that its parts run, on tiny sizes."""

import json
import os
import subprocess
import sys

import pytest
import torch

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
    assert report["problems"] == []
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("gpu_check: problems:\nnone\n")
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


def problems_of(part):
    import gpu_check

    return gpu_check.problems({"settings": {"device": "cpu"}, "parts": {"part": part}})


def test_a_part_that_breaks_goes_on_behind_what_broke_it(run_part):
    found = run_part(BROKEN, 200)
    figures = found["figures"]
    assert found["status"] == "done"
    assert figures["first"]["value"] == 1
    assert figures["second"]["error"] == "ValueError: not so bad"
    assert "illegal memory access" in figures["third"]["error"]
    assert "ended in the middle" in figures["fourth"]["error"]
    assert figures["fifth"]["value"] == 5
    begins = ["part: second: error: ", "part: third: error: ", "part: fourth: error: "]
    assert [text[: len(b)] for text, b in zip(problems_of(found), begins, strict=True)] == begins


def test_a_part_is_stopped_at_its_time(run_part, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "LEAST", 0.0)
    found = run_part("import time; time.sleep(60)", 1.5)
    assert found["status"].startswith("stopped after")
    assert found["seconds"] < 30
    assert problems_of(found) == [f"part: {found['status']}"]


@pytest.fixture
def check(benchmarks, tmp_path, monkeypatch, capsys):
    """All of gpu_check, of parts that take no time; what it gives back, reports and prints."""
    import gpu_check

    def run(run_part):
        monkeypatch.setattr(gpu_check, "run_part", run_part)
        line = ["gpu_check", "--device", "cpu", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*line, "--only", "environment", "--only", "tuning"])
        status = gpu_check.main()
        return status, json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out

    return run


def test_problems_are_reported_printed_and_the_exit_status(check, tmp_path):
    import gpu_check

    figures = {"bank": {"64 read": {"failed": "KeyError: 1"}}}
    done = check(lambda part, *_: gpu_check.reported(part, "done", 1.0, figures))
    status, report, printed = done
    expected = [f"{name}: bank: 64 read: failed: KeyError: 1" for name in ("environment", "tuning")]
    assert status == 1
    assert report["problems"] == expected
    assert printed.endswith("\n".join(["gpu_check: problems:", *expected, ""]))
    assert f"## Problems\n\n- {expected[0]}\n" in (tmp_path / "gpu.md").read_text()


def test_without_problems_the_exit_status_is_0(check):
    import gpu_check

    done = check(lambda part, *_: gpu_check.reported(part, "done", 1.0, {"sam": {"graphs": 0}}))
    status, report, printed = done
    assert status == 0
    assert report["problems"] == []
    assert printed.endswith("gpu_check: problems:\nnone\n")


def test_a_report_names_the_parts_that_are_not_begun(check, tmp_path):
    import gpu_check

    seen = []

    def run_part(part, *_):
        seen.append(json.loads((tmp_path / "gpu.json").read_text())["problems"])
        return gpu_check.reported(part, "done")

    assert check(run_part)[0] == 0
    assert seen == [["environment: not begun", "tuning: not begun"], ["tuning: not begun"]]


@pytest.fixture
def broken_faiss(tmp_path):
    """A folder for --faiss whose load.py raises after it has put the folder in front."""
    folder = tmp_path / "faiss_folder"
    folder.mkdir()
    begin = "import sys\nsys.path.insert(0, '/nowhere')\n"
    (folder / "load.py").write_text(begin + "raise OSError('libcublas.so.13: no such file')\n")
    return folder


def test_a_folder_without_a_working_faiss_costs_nothing_else(script, tmp_path, broken_faiss):
    arguments = ("--device", "cpu", "--tiny", "--only", "environment", "--faiss", broken_faiss)
    done = script(*arguments, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    part = report["parts"]["environment"]
    assert part["status"] == "done"
    assert {"versions", "device", "copy", "launches"} < set(part["figures"])
    assert report["problems"] == ["faiss: error: OSError: libcublas.so.13: no such file"]
    assert done.returncode == 1


def test_a_part_goes_on_without_a_folder_that_has_no_working_faiss(
    benchmarks, tmp_path, broken_faiss, monkeypatch
):
    import gpu_common
    import gpu_tests

    before, results = list(sys.path), tmp_path / "results.json"
    line = ["part", "--device", "cpu", "--results", str(results), "--faiss", str(broken_faiss)]
    monkeypatch.setattr(sys, "argv", line)
    given = gpu_common.options("")
    assert sys.path == before
    assert given.faiss is None
    assert "load" not in gpu_tests.command(["a test"], given, alone=True)
    kept = gpu_common.Results(given.results, 10.0).figures
    assert kept == {"faiss": {"error": "OSError: libcublas.so.13: no such file"}}


def test_a_bank_that_ends_its_process_leaves_no_figures_that_look_whole(benchmarks, tmp_path):
    import gpu_banks

    class Ends(gpu_banks.Measured):
        def search(self, queries):
            raise KeyboardInterrupt  # as little handled as the end of the process

    given = gpu_banks.Options(device=torch.device("cpu"), tiny=True)
    results = gpu_banks.Results(tmp_path / "results.json", 60.0)
    size = gpu_banks.Size("bank", 100, torch.float32)
    measured = Ends(given, size, gpu_banks.Speed(None, None))
    with pytest.raises(KeyboardInterrupt):
        results.run("bank", lambda: measured.figures(results))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["bank"]["16 read"]["ms"] > 0
    assert problems_of({"status": "done", "figures": kept}) == [
        "part: bank: stopped: the process ended in the middle of it"
    ]


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
    cases, collected, stopped = gpu_tests.run([str(tmp_path / "test_some.py")], given, 60.0)
    assert collected == 3
    assert stopped is None
    by_name = {name.split("::")[-1]: case for name, case in cases.items()}
    assert {name: case["kind"] for name, case in by_name.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_left_out": "skipped",
    }
    assert "one is not two" in by_name["test_bad"]["message"]
    assert by_name["test_left_out"]["message"] == "Skipped: needs more"


ENDS = """
import os, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_ends(): os._exit(9)
def test_never_run(): pass
"""


@pytest.fixture
def suite(benchmarks, tmp_path, monkeypatch):
    """gpu_tests.suite of a file."""
    import gpu_tests

    def run(text, seconds=60.0, tiny=True):
        (tmp_path / "test_some.py").write_text(text)
        monkeypatch.setattr(gpu_tests, "files", lambda tiny: [str(tmp_path / "test_some.py")])
        return gpu_tests.suite(gpu_tests.Options(tiny=tiny, faiss=None), seconds)

    return run


def test_a_suite_that_ends_half_way_is_a_problem(suite):
    figures = suite(ENDS)
    assert (figures["passed"], figures["failed"], figures["collected"]) == (1, 0, 3)
    assert problems_of({"status": "done", "figures": {"pytest": figures}}) == [
        "part: pytest: stopped: pytest ended with exit status 9",
        "part: pytest: only 1 of 3 tests ended",
    ]


def test_a_suite_that_is_out_of_time_is_a_problem(suite, monkeypatch):
    import gpu_tests

    def out_of_time(line, timeout, env, **_):
        case = {"name": "one", "kind": "passed", "message": "", "seconds": 1.0}
        with open(env[gpu_tests.LINES], "w") as file:
            file.write(json.dumps({"collected": 2}) + "\n" + json.dumps(case) + "\n")
        raise subprocess.TimeoutExpired(line, timeout)

    monkeypatch.setattr(gpu_tests.subprocess, "run", out_of_time)
    figures = suite("", seconds=100.0)
    assert problems_of({"status": "done", "figures": {"pytest": figures}}) == [
        "part: pytest: stopped: pytest was stopped after 85 s",
        "part: pytest: only 1 of 2 tests ended",
    ]


@pytest.mark.slow
def test_tests_in_several_processes_are_counted_once(suite, monkeypatch):
    import gpu_tests

    pytest.importorskip("xdist")
    monkeypatch.setattr(gpu_tests, "WORKERS", 2)
    figures = suite(TESTS, tiny=False)
    counts = [figures[name] for name in ("passed", "failed", "skipped", "collected")]
    assert counts == [1, 1, 1, 3]
    assert figures["stopped"] is None


def test_files_with_gpu_tests_are_found(benchmarks):
    import gpu_tests

    found = gpu_tests.files(tiny=False)
    assert "tests/models/test_captured.py" in found
    assert "tests/tasks/test_copying.py" not in found
