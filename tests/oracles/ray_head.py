"""A Ray cluster of one node, as `ray start` makes it: on loopback, with a token, then gone."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
REPORT_SECONDS = 5  # how often processes tell their node's agent of their figures
COMMANDS = Path(sys.executable).parent  # where `ray` and `sparsemem` are


class Head(NamedTuple):
    """A head node that runs."""

    folder: Path  # HOME, with the token, and what Ray writes
    environment: dict[str, str]  # of whoever may use it
    dashboard: str
    metrics: str

    def run(self, *command, **environment):
        """Run a command, as somebody who may use the cluster unless told otherwise."""
        return subprocess.run(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )


@contextmanager
def ray_head(num_cpus):
    """As docs/cluster.md says; `--block`, since `ray stop` would stop others' clusters too."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets are in it
    port, dashboard, metrics, agent = (free_port() for _ in range(4))
    options = [
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--num-cpus={num_cpus}",
        f"--dashboard-port={dashboard}",
        f"--metrics-export-port={metrics}",
        f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={folder}/ray",
        "--disable-usage-stats",
        "--block",
    ]
    environment = environment_of(folder)
    # Named, as `auto` would find whatever else runs on this machine.
    users = environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    addresses = [f"http://127.0.0.1:{port}" for port in (dashboard, metrics)]
    healthy = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"  # of who starts jobs
    head = Head(folder, users, *addresses)
    made = head.run("ray", "get-auth-token", "--generate")
    assert made.returncode == 0, made.stderr
    with open(folder / "log", "wb") as log:
        command = ["ray", "start", "--head", *options]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for page in (f"{head.dashboard}/api/gcs_healthz", f"{head.metrics}/metrics", healthy):
            wait_until(lambda page=page: answers(page) == 200, process, folder / "log")
        yield head
    finally:
        end_all(folder)  # nothing to wait for: all that it has written goes too
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def environment_of(home):
    """With tokens, addresses and settings of this process left out."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {
        "HOME": str(home),
        "PATH": f"{COMMANDS}:{kept['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback: see docs/cluster.md
        "RAY_metrics_report_interval_ms": str(1000 * REPORT_SECONDS),
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(address, token=None):
    """The status of a page, None where nobody listens."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as page:
            return page.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def wait_until(holds, process, log, patience=120.0):
    deadline = time.monotonic() + patience
    while not holds():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end_all(folder, patience=30.0):
    """End all processes of a cluster; of themselves, Ray's agents may take a minute."""
    deadline = time.monotonic() + patience
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.2)


def listening(folder):
    """Addresses that a cluster's processes listen at; those of IPv6 in hexadecimal."""
    inodes = {inode for process in processes_of(folder) for inode in sockets_of(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                address = local.split(":")[0]
                if table == "tcp":
                    address = socket.inet_ntoa(bytes.fromhex(address)[::-1])
                found.add(address)
    return found


def sockets_of(process):
    """Inodes of a process's sockets."""
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                yield target[len("socket:[") : -1]


def processes_of(folder, name=b""):
    """Processes that have a folder for their HOME, and a word in their command line."""
    home = f"HOME={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone, or somebody else's
            line = (process / "cmdline").read_bytes()
            if line and name in line and home in (process / "environ").read_bytes().split(b"\0"):
                found.append(process)
    return found
