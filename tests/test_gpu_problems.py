"""What scripts/gpu_check calls a problem, and what not, without and with a GPU."""

import copy
import json

import pytest
import torch

NAN = float("nan")
COUNTS = {"passed": 3, "failed": 0, "skipped": 1}
BUILT = {"built": True, "on": "DeviceDerived", "stats": {"exact": "False", "error": "None"}}
AGREES = {"kernels_output": 1e-15, "captured_gradients": 3e-15}


@pytest.fixture
def gpu_problems(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import gpu_problems

    return gpu_problems


@pytest.fixture
def problems(gpu_problems):
    """Of one figure of a part that was done."""

    def of(figure, device="cuda", status="done"):
        part = {"status": status, "figures": {"figure": figure}}
        found = gpu_problems.problems({"settings": {"device": device}, "parts": {"part": part}})
        return [text.removeprefix("part: figure: ") for text in found]

    return of


@pytest.fixture
def committed(repository):
    return json.loads((repository / "benchmarks/gpu.json").read_text())


def test_the_problems_of_the_committed_report(gpu_problems, committed):
    low = "ivf: recall at last: recall 0.6123 is below its floor of 0.95"
    assert gpu_problems.problems(committed) == [low]


@pytest.mark.parametrize(
    "figure",
    [
        {"ms": 1.0, "graphs": 1, "failure": None},
        {"64 agreement": {"found": 1.0}, "64 read": {"ms": 1.0}},
        {"recall": 0.95, "floor": 0.95},
        {"recall": 0.3, "floor": None},
        {"fresh": 1.0, "stale": 0.0},
        AGREES,
        BUILT,
        COUNTS,
        COUNTS | {"collected": 4, "stopped": None, "skipped_because": ["Skipped: takes long"]},
    ],
)
def test_no_problems(problems, figure):
    assert problems(figure) == []


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        ({"error": "ValueError: not\n so bad"}, "error: ValueError: not so bad"),
        ({"64 read": {"failed": "KeyError: 1"}}, "64 read: failed: KeyError: 1"),
        ({"stopped": "in the middle"}, "stopped: in the middle"),
        ({"graphs": 1, "failure": "RuntimeError: a wait"}, "failure: RuntimeError: a wait"),
        ({"graphs": 0, "failure": None}, "nothing was captured: graphs 0"),
        ({"16 faiss": {"skipped": "no time was left"}}, "16 faiss: skipped: no time was left"),
        ({"skipped": "needs a GPU"}, "skipped: needs a GPU"),
        ({"a": {"found": 0.9}}, "a: found 0.9, expected 1: rows that torch finds are missed"),
        ({"found": NAN}, "found nan, expected 1: rows that torch finds are missed"),
        ({"recall": 0.9, "floor": 0.95}, "recall 0.9 is below its floor of 0.95"),
        ({"recall": NAN, "floor": 0.95}, "recall nan is below its floor of 0.95"),
        (
            {"fresh": 0.5, "stale": 0.0},
            "fresh 0.5, stale 0.0, expected 1 and 0: moved rows are not where they are",
        ),
        (
            {"fresh": 1.0, "stale": 0.1},
            "fresh 1.0, stale 0.1, expected 1 and 0: moved rows are not where they are",
        ),
        (
            AGREES | {"captured_output": 0.9},
            "captured_output 0.9 is not within 1e-09 of the torch code",
        ),
        (
            AGREES | {"kernels_gradients": NAN},
            "kernels_gradients nan is not within 1e-09 of the torch code",
        ),
        (BUILT | {"built": False}, "not built in time: searches are scans"),
        (BUILT | {"stats": {"exact": "True"}}, "the index gave way to exact search"),
        (BUILT | {"on": "Derived"}, "the index is on the host, expected on the GPU"),
        (
            BUILT | {"stats": {"exact": "False", "error": "OSError()"}},
            "stats: error: OSError()",
        ),
        (COUNTS | {"failed": 1}, "failed: 1"),
        (COUNTS | {"collected": 324}, "only 4 of 324 tests ended"),
        (COUNTS | {"passed": 0, "skipped": 324}, "no test passed, 324 were skipped"),
        (
            COUNTS | {"fell_with_the_device": 2},
            "2 tests failed with a broken device at first",
        ),
        (
            COUNTS | {"skipped_because": ["Skipped: needs a GPU"]},
            "tests were skipped: needs a GPU",
        ),
        (
            COUNTS | {"skipped_because": ["Skipped: could not import 'faiss'"]},
            "tests were skipped: could not import 'faiss'",
        ),
    ],
)
def test_a_problem(problems, figure, expected):
    assert problems(figure) == [expected]


@pytest.mark.parametrize(
    "figure",
    [
        {"graphs": 0, "failure": None},
        {"skipped": "needs a GPU", "shapes": 6},
        {"16 captured search": {"skipped": "needs a GPU"}},
        BUILT | {"on": "Derived"},
        COUNTS | {"passed": 0, "skipped": 7, "skipped_because": ["Skipped: needs a GPU"]},
    ],
)
def test_what_needs_a_gpu_is_no_problem_without_one(problems, figure):
    assert problems(figure, device="cpu") == []
    assert problems(figure, device="cuda:1") != []


@pytest.mark.parametrize(
    "figure",
    [
        {"error": "it broke"},
        {"graphs": 0, "failure": "it broke"},
        {"skipped": "no time was left"},
        {"16 agreement": {"found": 0.5}},
        BUILT | {"built": False},
        COUNTS | {"failed": 1},
        COUNTS | {"collected": 5},
    ],
)
def test_what_needs_no_gpu_is_a_problem_without_one(problems, figure):
    assert len(problems(figure, device="cpu")) == 1


def test_a_part_that_was_not_done_is_one(problems):
    assert problems({}, status="stopped after 60 s") == ["part: stopped after 60 s"]


def test_what_every_part_says_of_faiss_is_said_once(gpu_problems, committed):
    before = gpu_problems.problems(committed)
    for part in committed["parts"].values():
        part["figures"]["faiss"] = {"error": "OSError: no such library"}
    found = gpu_problems.problems(committed)
    assert sorted(found) == sorted(["faiss: error: OSError: no such library", *before])


def test_a_report_begins_with_its_problems(gpu_problems, committed):
    import gpu_report

    begin = gpu_report.markdown(committed | {"problems": ["ivf: it broke", "more"]})
    assert begin.startswith(
        "# scripts/gpu_check\n\n## Problems\n\n- ivf: it broke\n- more\n\n## env"
    )
    none = gpu_report.markdown(committed | {"problems": []})
    assert none.startswith("# scripts/gpu_check\n\n## Problems\n\n- none\n\n## environment")


def test_a_report_shows_what_there_is_beside_what_there_was_no_time_for(committed):
    import gpu_report

    report = copy.deepcopy(committed) | {"problems": []}
    figures = report["parts"]["models"]["figures"]
    figures["sam agreement"] = figures["sam kernels"] = {"skipped": "no time was left"}
    shown = gpu_report.markdown(report)
    assert "cannot be shown" not in shown
    assert "| sdnc captured | 18.190 |" in shown
    assert "one captured pass" not in shown


@pytest.mark.parametrize("where", [0, 1])
def test_a_difference_that_is_no_number_is_not_lost(gpu_problems, where):
    import gpu_models

    truth = [torch.ones(2), torch.full((2,), 4.0)]
    ours = [torch.tensor([1.0, 1.5]), torch.tensor([4.0, 3.0])]
    assert gpu_models.difference(ours, truth) == 0.5
    ours[where][1] = NAN
    assert torch.tensor(gpu_models.difference(ours, truth)).isnan()


def test_captured_figures_say_how_many_graphs(gpu_problems):
    import gpu_models

    given = gpu_models.Options(device=torch.device("cpu"), tiny=True, quick=True)
    sizes = gpu_models.Sizes(batch=1, steps=2, hidden=4, slots=8, heads=1, top_k=2, slot_dim=4)
    for work in (gpu_models.forward, gpu_models.training, gpu_models.kernels, gpu_models.agreement):
        figures = work(given, sizes)
        assert figures["graphs"] == 0  # without a GPU
        assert figures["failure"] is None
    assert "graphs" not in gpu_models.timed(given, sizes, gpu_models.CudnnLSTM(sizes))


def test_the_floor_after_all_rows_have_moved_is_held_on_a_gpu(gpu_problems, monkeypatch):
    import gpu_ivf

    given = gpu_ivf.Options(device=torch.device("cpu"), tiny=True)
    watched = gpu_ivf.Watched(gpu_ivf.Sizes(given))
    monkeypatch.setattr(watched, "recall", lambda: {"recall": 0.6, "floor": 0.95})
    assert watched.recall_at_last() == {"recall": 0.6, "floor": None}
    watched.device = torch.device("cuda")
    assert watched.recall_at_last() == {"recall": 0.6, "floor": 0.95}
