"""Teams of processes, without Ray."""

import json
import subprocess
import sys

import pytest
import torch

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
    figures = [{name: x for name, x in value.items() if name != "gradients"} for value in values]
    assert all(each == figures[0] for each in figures)
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


def test_gradients_of_sub_keys_are_averaged_and_those_of_rows_are_not(members):
    values, _ = members
    own, team = (
        [[torch.tensor(x) for x in value["gradients"][kind]] for value in values]
        for kind in ("own", "team")
    )
    mean = sum(keys for keys, _ in own) / SIZE
    for (own_keys, own_rows), (keys, rows) in zip(own, team, strict=True):
        assert not torch.equal(own_keys, keys)
        torch.testing.assert_close(keys, mean)
        assert torch.equal(own_rows, rows)
    assert torch.equal(team[0][0], team[1][0])


def test_a_gradient_beside_the_others_is_averaged(members):
    values, _ = members
    assert [value["apart"] for value in values] == [[1.5, 1.5]] * SIZE


def test_no_model_outlives_its_group(members):
    """Else torch may wait for ever where the last one goes: see `leave`."""
    values, _ = members
    assert [value["models"] for value in values] == [0] * SIZE
