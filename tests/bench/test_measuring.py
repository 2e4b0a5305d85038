import pytest
import torch

from sparsemem.bench import measuring
from sparsemem.bench.measuring import Summary, Timings, interleaved, tensor_peak


def test_functions_are_called_in_turns():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == list("ababab")
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_within_repetitions():
    times = Timings({"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 3.0]})
    assert times.median("a") == 6.0
    assert times.ratio("a", "b") == 2.0


def test_a_summary_has_quartiles():
    summary = Summary.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (summary.lower_quartile, summary.median, summary.upper_quartile) == (2.0, 3.0, 4.0)


def test_the_peak_counts_what_is_alive_at_once():
    def work():
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8)  # let go at once
        kept = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2)]
        return kept

    assert tensor_peak(work) == pytest.approx(2 << 20, rel=0.01)


def test_the_commit_is_that_of_a_repository_which_has_the_package(repository, tmp_path):
    found = measuring.machine()
    assert found["torch"] == torch.__version__
    assert "1 thread used" in found["cpu"]
    if (repository / ".git").exists():
        assert len(found["commit"].removesuffix("-dirty")) == 40
    assert "commit" not in measuring.machine(tmp_path)
