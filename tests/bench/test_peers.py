import json
import sys

import pytest

from sparsemem.bench import peers as module
from sparsemem.bench.peer_worker import PEERS, Server
from sparsemem.bench.peers import ENVIRONMENTS, GROUPS, PeerPoint, PeerProcess, PeerSettings, peers
from sparsemem.bench.points import ModelSettings
from sparsemem.bench.schedule import Listener
from sparsemem.bench.tables import peers_markdown
from sparsemem.bench.workers import WorkerError

SETTINGS = PeerSettings(
    model=ModelSettings(batch=2, steps=3, heads=2, top_k=2, width=4, hidden=8),
    slots=16,
    subkeys=8,
    value_width=8,
    tokens=4,
    rows=400,
    row_width=8,
    queries=4,
    repetitions=2,
    groups=("search",),
)
SILENT = Listener(lambda line: None, lambda total: None, lambda: None)


def process(peer, python=sys.executable):
    return PeerProcess(PeerPoint(peer, python, 1, SETTINGS.work()))


@pytest.mark.parametrize(
    "peer",
    [
        "sparsemem SAM",
        "sparsemem product keys",
        "EmbeddingBag + SparseAdam",
        "FAISS rebuilt each step",
        "sparsemem bank",
    ],
)
def test_a_peer_does_its_work_when_asked(peer):
    """In this process; in one of its own, and over a pipe, one does so below."""
    server, settings = Server(), json.loads(json.dumps(SETTINGS.work()))
    asked = {"command": "make", "peer": peer, "threads": 1, "settings": settings}
    assert server.answer(asked)["figures"]["make_seconds"] > 0
    assert 0 < server.answer({"command": "step"})["seconds"] < 60


def test_a_peer_that_is_not_installed_is_reported_and_the_others_go_on(monkeypatch):
    groups = {"search": ("EmbeddingBag + SparseAdam", "no such peer")}
    monkeypatch.setattr(module, "GROUPS", groups)
    result = peers(SETTINGS, {}, SILENT)
    (measured,) = result.points
    assert (measured.kind, measured.name, measured.size) == ("peer", groups["search"][0], 400)
    assert len(measured.times["step"].values) == 2
    (skipped,) = result.skipped
    assert (skipped.name, skipped.reason) == ("no such peer", "KeyError: 'no such peer'")
    shown = peers_markdown(result, groups)
    assert "| EmbeddingBag + SparseAdam | 400 | " in shown
    assert "| no such peer |  | not measured: KeyError: 'no such peer' |" in shown


def script(tmp_path, body):
    """A program that stands for a Python with a peer."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'no such module' >&2; exit 3", "its process ended with code 3: no such module"),
        ("read line; echo hello", r"answered b'hello\\n', expected JSON"),
        ('read line; echo \'{"error": "broken"}\'', "^broken$"),
        ("sleep 20", "took longer than the 1 s that were left"),
    ],
)
def test_what_goes_wrong_in_another_environment_is_said(tmp_path, body, message):
    worker = process("dnc DNC", script(tmp_path, body))
    with pytest.raises(WorkerError, match=message):
        worker.made(1.0)
    worker.close()


def test_a_python_that_cannot_be_run_is_said(tmp_path):
    with pytest.raises(WorkerError, match=r"cannot run .*none: No such file or directory"):
        process("dnc DNC", str(tmp_path / "none"))


def test_peers_run_in_the_environment_that_was_named():
    series = module._series("dnc DNC", "dnc", SETTINGS, {"dnc": "/other/python"})
    assert series.point(16, 3).python == "/other/python"
    ours = module._series("sparsemem DNC", "dnc", SETTINGS, {"dnc": "/other/python"})
    assert ours.point(16, 3).python == sys.executable


def test_every_peer_of_a_group_is_known_to_the_worker():
    assert {name for names in GROUPS.values() for name in names} == set(PEERS)
    assert set(ENVIRONMENTS) <= set(PEERS)
    assert SETTINGS.size("product-keys") == 64
