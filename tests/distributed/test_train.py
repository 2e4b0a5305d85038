"""Training over shards and trainers, for real: Ray's processes, and kills of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsemem.distributed.cluster import ClusterError, Wanted
from sparsemem.distributed.commands import keeper_for
from sparsemem.distributed.keeper import BANK, STATS
from sparsemem.errors import UserError
from sparsemem.training.config import dump_config
from sparsemem.training.errors import RunError
from sparsemem.training.launch import evaluate_run
from sparsemem.training.run import RunFolder
from sparsemem.training.trainer import Outcome
from tests.oracles.sharded_runs import (
    WORKERS,
    actors,
    alone,
    children,
    config_of,
    largest_difference,
    last_step,
    metrics,
    rows,
)

NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
pytestmark = [pytest.mark.ray, NEEDS_RAY, pytest.mark.timeout(600)]

STEPS, TRAINER_AT, SHARD_AT = 40, 12, 24
WANTED, FEWEST = Wanted(2, WORKERS), Wanted(1, WORKERS)


def start(path, config, wanted=WANTED):
    from sparsemem.distributed import launch

    return launch.start(config, path, wanted, announce=lambda line: None)


@pytest.fixture(scope="module")
def undisturbed(_cluster, tmp_path_factory):
    run, outcome = start(tmp_path_factory.mktemp("undisturbed") / "run", config_of(steps=STEPS))
    assert outcome is Outcome.FINISHED
    return run


def test_a_run_is_that_of_one_process(undisturbed, tmp_path):
    """To rounding: gradients of both shares are added up in another order than in one batch."""
    one = alone(tmp_path / "one", config_of(steps=STEPS))
    assert largest_difference(metrics(undisturbed), metrics(one)) < 1e-12
    rows = keeper_for(undisturbed)
    result, step = evaluate_run(undisturbed, undisturbed.config(), "last", "test", rows)
    expected, _ = evaluate_run(one, one.config(), "last", "test")
    assert step == STEPS
    assert result.loss == pytest.approx(expected.loss, abs=1e-12)
    assert (undisturbed.path / STATS).is_file()


def test_a_run_with_product_keys_is_that_of_one_process(cluster, tmp_path):
    """To rounding, which Adam makes more of where the gradient of a sub-key is about its eps."""
    config = config_of("product-key", steps=6)
    run, outcome = start(tmp_path / "run", config)
    assert outcome is Outcome.FINISHED
    one = alone(tmp_path / "one", config)
    assert largest_difference(metrics(run), metrics(one)) < 1e-9
    pairs = zip(rows(run, keeper_for=keeper_for(run)), rows(one), strict=True)
    assert max((own - other).abs().max() for own, other in pairs) < 1e-9


class Killer(threading.Thread):
    """Kills an actor's process once a run has got to a step, for each of some kinds."""

    def __init__(self, path, kills):
        super().__init__(daemon=True)
        self.path, self.kills, self.killed = path, kills, []

    def run(self):
        for step, kind in self.kills:
            while last_step(self.path) < step:
                time.sleep(0.02)
            pid = actors(kind)[-1]
            os.kill(pid, signal.SIGKILL)
            self.killed.append((kind, pid))


def test_killed_trainers_and_shards_change_nothing(cluster, undisturbed, tmp_path, capfd):
    path = tmp_path / "run"
    killer = Killer(path, [(TRAINER_AT, "RayTrainWorker"), (SHARD_AT, "ShardActor")])
    killer.start()
    run, outcome = start(path, config_of(steps=STEPS))
    assert outcome is Outcome.FINISHED
    assert [kind for kind, _ in killer.killed] == ["RayTrainWorker", "ShardActor"]
    assert metrics(run) == metrics(undisturbed)
    assert "trainers were lost, others go on from step 10" in capfd.readouterr().err


def test_what_diverges_ends_at_once(cluster, tmp_path, capfd):
    config = config_of(gradient_clip=None, optimizer={"name": "sgd", "learning_rate": 1e4})
    with pytest.raises(RunError, match=r"is (nan|inf) at step \d+ .*; no checkpoint yet"):
        start(tmp_path / "run", config, FEWEST)
    assert "trainers were lost" not in capfd.readouterr().err
    assert actors("RayTrainWorker") == []


def test_a_folder_that_workers_do_not_see_is_refused(cluster, tmp_path, monkeypatch):
    from sparsemem.distributed import launch

    monkeypatch.setattr(launch, "replace_file", lambda path, data: None)
    with pytest.raises(RunError, match=r"worker \d on node .* does not see .*all nodes share"):
        start(tmp_path / "run", config_of(), FEWEST)


def test_what_does_not_fit_is_refused_with_the_sum(cluster, tmp_path):
    from sparsemem.distributed import launch

    wanted = Wanted(200, 1)
    with pytest.raises(ClusterError, match=r"200 shards of 1 CPU.* need 201 CPUs.*has 16 CPUs"):
        launch.start(config_of(), tmp_path / "run", wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("errors", [3, 2])
def test_errors_that_come_again_end_training(tmp_path, errors):
    from sparsemem.distributed.trainers import GivingUp
    from sparsemem.distributed.worker import TrainerFailed

    (tmp_path / "step-00000010").mkdir()
    giving_up, failed, died = GivingUp(tmp_path), TrainerFailed("text"), OSError("it died")
    giving_up.after_exception(None, {0: failed, 1: died})  # may come of the other's death
    for _ in range(2):
        giving_up.after_exception(None, {0: failed})
    if errors == 2:
        (tmp_path / "step-00000020").mkdir()  # they have got further since
        giving_up.after_exception(None, {0: failed, 1: failed})
        return
    with pytest.raises(TrainerFailed):
        giving_up.after_exception(None, {0: failed})


def test_a_users_error_ends_training_at_once(tmp_path):
    from sparsemem.distributed.trainers import GivingUp
    from sparsemem.distributed.worker import TrainerFailed

    with pytest.raises(UserError, match="mend this"):
        GivingUp(tmp_path).after_exception(None, {0: TrainerFailed("x"), 1: UserError("mend this")})


def command(*arguments):
    """The command line, with Ray of its own: no setting of this process's is handed on."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "sparsemem.cli", "train", *map(str, arguments)],
        env=kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_while(process, holds):
    """Wait for a command that goes on."""
    while holds():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def agents(pids):
    """Ray's agents among processes: they wait for a minute for a killed cluster."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # it is gone
            if b"Agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def left_of(pids, patience=90.0):
    """Those that are not gone in time."""
    deadline = time.monotonic() + patience
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return []


def test_the_command_line_stops_and_goes_on_and_leaves_nothing_behind(tmp_path):
    config = config_of(steps=150)  # trainers whose driver is gone get no further than some of them
    (tmp_path / "config.yaml").write_text(dump_config(config))
    run = tmp_path / "run"
    first = command(tmp_path / "config.yaml", "--run", run, "--shards", 2, "--workers", WORKERS)
    wait_while(first, lambda: last_step(run) < 3)
    killed = children(first.pid)
    waiting = agents(killed)
    first.kill()  # a driver that is gone
    first.communicate()
    assert left_of(killed - waiting) == []

    second = command("--resume", run, "--workers", WORKERS)
    wait_while(second, lambda: not actors("RayTrainWorker", second.pid))
    pids = children(second.pid)
    os.killpg(second.pid, signal.SIGINT)  # as a terminal does
    _, said = second.communicate()
    assert second.returncode == 130, said
    assert "asked to stop: saving" in said
    assert "go on with: sparsemem train --resume" in said
    assert len(pids) > 4
    assert left_of(pids) == []

    third = command("--resume", run, "--workers", WORKERS)
    _, said = third.communicate()
    assert third.returncode == 0, said
    assert "all steps are done; run" in said
    one = metrics(alone(tmp_path / "one", config))
    assert largest_difference(metrics(RunFolder(run)), one) < 1e-12
    assert (run / BANK / "shard-00001").is_dir()
    assert left_of(killed) == []
