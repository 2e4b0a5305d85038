"""Teams of processes, without Ray."""

import json
import subprocess
import sys

import pytest

from sparsemem.training.run import RunFolder
from tests.oracles import team_member
from tests.oracles.sharded_runs import largest_difference, metrics

SIZE = 2


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """What each member had of it; and the run's folder."""
    folder = tmp_path_factory.mktemp("team")
    command = [sys.executable, team_member.__file__, str(SIZE), str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    files = [folder / f"member-{rank}.json" for rank in range(SIZE)]
    return [json.loads(file.read_text()) for file in files], folder


def test_members_see_the_same_figures(members):
    values, _ = members
    assert all(value == values[0] for value in values)
    assert values[0]["means"] == [0.5, 1.0]
    assert values[0]["told"] == [5.0]


def test_a_team_trains_as_one_does(members, tmp_path):
    _, folder = members
    run = RunFolder(tmp_path / "run")
    team_member.train(run)
    steps = team_member.CONFIG["training"]["steps"]
    own = [record for record in metrics(RunFolder(folder / "run")) if record["step"] <= steps]
    assert largest_difference(own, metrics(run)) < 1e-12


def test_all_stop_where_one_is_asked(members):
    values, _ = members
    assert values[0]["outcomes"] == ["FINISHED", "INTERRUPTED"]
    steps = team_member.CONFIG["training"]["steps"]
    assert values[0]["step"] == steps + 1  # it is told along with the next step's figures


def test_no_model_outlives_its_group(members):
    """Else torch may wait for ever where the last one goes: see `leave`."""
    values, _ = members
    assert [value["models"] for value in values] == [0] * SIZE
