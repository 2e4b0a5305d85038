import json

import pytest
import torch

from sparsemem.memory.episode import Episode
from sparsemem.training import profiling
from sparsemem.training.profiling import MEANING, Profile, named_regions, table
from sparsemem.training.regions import Stopwatch, listening


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(profiling, "WARM_UP", 1)
    monkeypatch.setattr(profiling, "TIMED", 3)
    monkeypatch.setattr(profiling, "TRACED", 1)


def test_a_profiled_run_says_where_time_goes_and_goes_on_to_the_same_numbers(
    tree, new_run, monkeypatch
):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    tree["training"] |= {"steps": 8}
    plain, run = new_run("plain", tree)
    plain.train(run)
    trainer, profiled = new_run("profiled", tree)
    trainer.train(profiled, profiled=True)
    for one, other in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert one.equal(other)

    found = json.loads((profiled.profile / "profile.json").read_text())
    assert found["steps"] == 3
    expected = {"data", "controller", "layers", "search", "memory", "loss", "autograd", "optimiser"}
    assert expected <= set(found["seconds_a_step"]) <= set(MEANING)
    assert all(seconds > 0 for seconds in found["seconds_a_step"].values())
    text = (profiled.profile / "profile.txt").read_text()
    assert "autograd" in text
    assert text.splitlines()[-1].endswith("mean of 3")
    events = json.loads((profiled.profile / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"sparsemem: search", "sparsemem: autograd", "sparsemem: data"} <= names


def test_a_run_that_ends_early_writes_what_there_is(tree, new_run):
    tree["training"] |= {"steps": 3}
    trainer, run = new_run("short", tree)
    trainer.train(run, profiled=True)
    assert json.loads((run.profile / "profile.json").read_text())["steps"] == 2
    assert not (run.profile / "trace.json").exists()

    said = []
    profile = Profile(trainer.model, run.path / "none", said.append)
    profile.close()
    assert said == ["no profile: it needs more than 1 training steps"]
    assert not (run.path / "none").exists()


def test_the_parts_are_as_they_were_afterwards(tree, new_run):
    trainer, _ = new_run("run", tree)
    cell, before = trainer.model.cell, Episode.search
    with named_regions(trainer.model):
        assert Episode.search is not before
        assert "forward" in vars(cell)
    assert Episode.search is before
    assert "forward" not in vars(cell)
    assert "forward" not in vars(cell.controller)


def test_tritons_kernels_have_regions_where_they_are_used(new_run, tree, triton_device):
    step = pytest.importorskip("sparsemem.kernels.gpu.step")
    trainer, _ = new_run("run", tree)
    model, before = trainer.model.to(triton_device), step.search_step
    seconds = Stopwatch()
    with listening(seconds), named_regions(model):
        assert step.search_step is not before
        model(torch.zeros(1, 2, model.input_size, device=triton_device))
    assert step.search_step is before
    assert seconds.seconds["kernels"] > 0


def test_the_table_is_sorted_and_adds_up():
    rows = table({"data": 0.001, "autograd": 0.003}, 2)
    assert rows[1].split()[:4] == ["autograd", "1.500", "75.0", "%"]
    assert rows[2].split()[:4] == ["data", "0.500", "25.0", "%"]
    assert rows[-1].split() == ["a", "step", "2.000", "mean", "of", "2"]
