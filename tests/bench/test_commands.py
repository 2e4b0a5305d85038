import json
import pickle

import pytest
from typer.testing import CliRunner

from sparsemem.bench import scaling
from sparsemem.bench.measuring import seconds
from sparsemem.bench.results import read_result
from sparsemem.cli import app
from sparsemem.console import USER_ERROR

pytestmark = pytest.mark.usefixtures("plain_errors")
TINY = ["--batch", "2", "--steps", "4", "--heads", "2", "--top-k", "2", "--width", "4"]
TINY += ["--hidden", "8", "--queries", "4", "--repetitions", "2"]


def bench(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_scaling_measures_a_point_in_a_process_of_its_own(tmp_path):
    what = ["--models", "lstm", "--sizes", "64", "--banks", "none"]
    bench("scaling", *TINY, *what, "--output", str(tmp_path / "out"))
    (point,) = read_result(tmp_path / "out" / "scaling.json").points
    assert (point.kind, point.name, point.size) == ("model", "lstm", 64)
    assert len(point.times["step"].values) == 2


class Here:
    """A `Worker` that is no process: what is sent to one, a copy of the point, is made here."""

    def __init__(self, point, threads):
        self.work = pickle.loads(pickle.dumps(point)).make()

    def made(self, limit):
        return {**self.work.figures, "make_seconds": 0.0}

    def measure(self, limit):
        return {name: seconds(work) for name, work in self.work.work.items()}

    def close(self):
        pass


def test_scaling_writes_what_it_measured_and_compare_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "Worker", Here)
    folder = tmp_path / "out"
    what = ["--models", "lstm,ntm", "--sizes", "16,64", "--banks", "exact", "--bank-sizes", "500"]
    shown = bench("scaling", *TINY, *what, "--output", str(folder))
    result = read_result(folder / "scaling.json")
    points = {(p.kind, p.name, p.size): p for p in result.points}
    assert set(points) == {
        ("model", "lstm", 16),
        ("model", "ntm", 16),
        ("model", "ntm", 64),
        ("bank", "exact", 500),
    }
    assert all(len(times.values) == 2 for p in points.values() for times in p.times.values())
    peaks = [points["model", "ntm", n].figures["peak_tensor_bytes"] for n in (16, 64)]
    assert peaks[1] > peaks[0]
    assert result.settings["model"]["steps"] == 4
    assert shown.stdout.startswith((folder / "scaling.md").read_text())
    assert "| 64 |  | " in shown.stdout
    assert (folder / "models.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "banks.png").read_bytes().startswith(b"\x89PNG")

    same = bench("compare", *[str(folder / "scaling.json")] * 2, "--all")
    assert "model ntm N=64, peak tensor bytes: 1.000 (0.980 .. 1.020) within noise" in same.stdout
    assert same.stdout.splitlines()[-1].startswith("0 of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scaling", "--models", "sum"], "--models names 'sum': did you mean 'sam'?"),
        (["scaling", "--banks", "hsnw"], "--banks names 'hsnw': did you mean 'hnsw'?"),
        (["scaling", "--sizes", "12x"], "--sizes has '12x', expected a size such as"),
        (["scaling", "--sizes", "1.5"], "--sizes has '1.5', expected a size such as"),
        (["scaling", "--min", "2^20", "--max", "2^10"], "--min is 1048576, expected at most"),
        (["scaling", "--budget", "0"], "--budget-minutes is 0.0: expected greater than 0"),
        (["scaling", "--width", "0"], "--width is 0: expected greater than or equal to 1"),
        (["scaling", "--models", "none", "--banks", "none"], "--models and --banks are none"),
        (["scaling", "--output", "full"], "--output full has a file scaling.md and no earlier"),
        (["peers", "--groups", "dnd"], "--groups names 'dnd': did you mean 'dnc'?"),
        (["peers", "--python", "dnc"], "--python dnc: expected NAME=PYTHON: "),
        (["peers", "--python", "dnc=/none"], "--python dnc=/none: /none cannot be run"),
        (["compare", "a.json", "b.json"], "cannot read a.json: No such file or directory"),
        (["compare", "foreign.json", "b.json"], "foreign.json is not a result of sparsemem bench"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "scaling.md").write_text("mine")
    (tmp_path / "foreign.json").write_text(json.dumps({"loss": 1}))
    result = bench(*arguments, code=USER_ERROR)
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "full" / "scaling.md").read_text() == "mine"
