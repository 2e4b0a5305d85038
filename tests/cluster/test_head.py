"""What docs/cluster.md says, on a head node that `ray start` made."""

import re
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest

from sparsemem.training.run import RunFolder
from tests.oracles.ray_head import REPORT_SECONDS, ROOT, answers, listening, processes_of, ray_head

# Looked for and not imported: this is read in every run of the tests.
HAS_DASHBOARD = find_spec("ray") is not None and find_spec("aiohttp_cors") is not None
NEEDS_RAY = pytest.mark.skipif(not HAS_DASHBOARD, reason="ray[default] is not installed")
pytestmark = [pytest.mark.ray, NEEDS_RAY]

EXAMPLE = ROOT / "examples/cluster.yaml"

SHARDS, ROWS, APPENDED, READS = 2, 40, 10, 5
CALLS = f"""
import sys
from pathlib import Path
import ray, torch
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.metrics import RunMetrics
from sparsemem.distributed.rayshards import RayShards

ray.init(log_to_driver=False)
path = ShardedBank.create(Path(sys.argv[1]), {ROWS}, 4, num_shards={SHARDS})
bank = ShardedBank(path, RayShards.start(path))
bank.append(torch.randn({APPENDED}, 4))
run = ray.remote(num_cpus=0)(RunMetrics).remote("runs/first")
ray.get(run.report.remote(7, 0.25))
for _ in range({READS}):
    bank.read(torch.randn(3, 4), 2)
print("done", flush=True)
sys.stdin.readline()
bank.close()
"""

ACTOR = """
import sys
import ray

class Actor:
    def ready(self):
        return True

ray.init(log_to_driver=False)
actor = ray.remote(Actor).remote()
assert ray.get(actor.ready.remote())
print("done", flush=True)
sys.stdin.readline()
"""
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
MAPPED_LOOPBACK = "0000000000000000FFFF00000100007F"  # ::ffff:127.0.0.1, in the kernel's order


@pytest.fixture(scope="module")
def head():
    with ray_head(num_cpus=8) as started:
        yield started


def submitted(head, *command, **environment):
    options = ["--address", head.dashboard, "--working-dir", str(ROOT / "examples")]
    return head.run("ray", "job", "submit", *options, "--", *command, **environment)


@pytest.mark.slow  # six processes that import torch and compile, and Ray's own
@pytest.mark.timeout(900)
def test_a_submitted_job_trains_over_shards(head, tmp_path):
    run = tmp_path / "run"
    sizes = ["--shards", "4", "--workers", "2", "--address", "auto", "--set", "training.steps=4"]
    done = submitted(head, "sparsemem", "train", "cluster.yaml", "--run", str(run), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder.open(run).newest_checkpoint().name == "step-00000004"
    assert len(list((run / "bank").glob("shard-*"))) == 4
    deadline = time.monotonic() + 30
    while processes_of(head.folder, b"ray::Shard"):  # they end with the job
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_without_the_token_nothing_is_done(head, tmp_path):
    mark = tmp_path / "mark"
    elsewhere = {"HOME": str(tmp_path)}
    done = submitted(head, "touch", str(mark), **elsewhere)
    assert done.returncode != 0
    assert "find an authentication token" in done.stderr
    assert answers(f"{head.dashboard}/api/jobs/") == 401
    assert not mark.exists()


def test_another_token_will_not_do(head, tmp_path):
    another = "0" * 32
    assert answers(f"{head.dashboard}/api/jobs/", another) == 403
    connect = "import ray; ray.init()"
    done = head.run(sys.executable, "-c", connect, RAY_AUTH_TOKEN=another)
    assert done.returncode != 0
    assert "Authentication token is missing or incorrect" in done.stderr


def test_it_listens_on_loopback_alone(head):
    """Also with a driver and actors, which have ports of their own."""
    with subprocess.Popen(
        [sys.executable, "-c", ACTOR], env=head.environment, text=True, **PIPES
    ) as driver:
        assert driver.stdout.readline() == "done\n"
        found = listening(head.folder)
        driver.communicate("\n", timeout=60)
    assert found <= {"127.0.0.1", MAPPED_LOOPBACK}
    assert found


def samples(head):
    """What the node's endpoint has of ours: (name, tags) -> value."""
    with urllib.request.urlopen(f"{head.metrics}/metrics") as page:
        text = page.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^ray_sparsemem_(\w+)\{(.*)\} (\S+)$", text, re.M):
        found[name, frozenset(re.findall(r'(\w+)="([^"]*)"', tags))] = float(value)
    return found


def by_shard(found, name, **tags):
    """Values of a figure, by shard."""
    return {
        dict(have)["shard"]: value
        for (named, have), value in found.items()
        if named == name and tags.items() <= dict(have).items()
    }


def test_prometheus_finds_the_shards_figures(head, tmp_path):
    bank = str(tmp_path / "bank")
    command = [sys.executable, "-c", CALLS, bank]
    with subprocess.Popen(command, env=head.environment, text=True, **PIPES) as driver:
        assert driver.stdout.readline() == "done\n"
        deadline = time.monotonic() + 60
        while not by_shard(samples(head), "shard_rows", bank=bank):
            assert time.monotonic() < deadline
            time.sleep(1)
        time.sleep(2.5 * REPORT_SECONDS)  # what is not told again is forgotten after 2
        found = samples(head)
        driver.communicate("\n", timeout=60)
    assert by_shard(found, "shard_rows", bank=bank) == {"0": ROWS / 2, "1": ROWS / 2}
    assert by_shard(found, "shard_rows_live", bank=bank) == {"0": APPENDED / 2, "1": APPENDED / 2}
    assert by_shard(found, "shard_recall", bank=bank) == {"0": 1.0, "1": 1.0}
    finds = {"bank": bank, "operation": "find"}
    assert by_shard(found, "shard_calls_total", **finds) == {"0": READS, "1": READS}
    for seconds in by_shard(found, "shard_call_seconds_total", **finds).values():
        assert 0 < seconds < 60
    runs = {named: value for (named, tags), value in found.items() if ("run", "runs/first") in tags}
    assert runs == {"run_step": 7, "run_loss": 0.25}
