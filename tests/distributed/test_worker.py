"""A trainer's work, without Ray."""

import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from sparsemem.training.trainer import Outcome
from tests.oracles.team_member import CONFIG

# What stands in for the parts is none of their types.
pytestmark = [
    pytest.mark.usefixtures("plain_errors"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]


class Nothing:
    """A part that is not asked for anything."""

    rank = 0

    def __init__(self, *given, **named):
        pass

    def another(self):
        """Shards for one more client."""

    def stop(self):
        """Whether to stop."""


@pytest.fixture
def worker():
    """The module, which takes seconds to import: not while tests are collected."""
    from sparsemem.distributed import worker

    return worker


@pytest.fixture
def made(monkeypatch, worker):
    """Weak references to the trainers that were made; everything around them does nothing."""
    found = []

    class Trainer:
        """In the place of the real one, which holds a model that holds the group."""

        step = 0

        def __init__(self, *given):
            found.append(weakref.ref(self))
            self.itself = self

        def train(self, *given):
            return Outcome.FINISHED

    around = ("seen_run", "RayShards", "open_bank", "join", "own_address", "prepare")
    for name in (*around, "GroupTeam", "Versions", "DeskReporter"):
        monkeypatch.setattr(worker, name, Nothing)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    collective = SimpleNamespace(broadcast_from_rank_zero=lambda value: value)
    train = SimpleNamespace(get_context=lambda: context, collective=collective)
    monkeypatch.setattr(worker, "ray", SimpleNamespace(train=train, get=lambda asked: False))
    monkeypatch.setattr(worker, "go_back", lambda run, bank: None)
    monkeypatch.setattr(worker, "Trainer", Trainer)
    return found


def test_the_trainer_is_gone_before_the_group(worker, made, monkeypatch, tmp_path):
    """See `leave`: where a model holds the group last, torch may wait for ever."""
    left = []
    monkeypatch.setattr(
        "sparsemem.distributed.team.dist.destroy_process_group",
        lambda: left.append([trainer() for trainer in made]),
    )
    desk = SimpleNamespace(begin=SimpleNamespace(remote=lambda: None))
    given = worker.Work(tmp_path, tmp_path, CONFIG, "session", [], 1.0, desk, False)
    assert worker.train(given) == "FINISHED"
    assert left == [[None]]
